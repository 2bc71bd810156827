"""Logit losses against the plain way: full logits of both models, log-softmax and autograd."""

import dataclasses
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvgraft.distill.cross_vocabulary import chunk_likelihood_loss, sorted_probability_loss, token_log_likelihood
from kvgraft.distill.logits import FullTarget, TopTarget, cross_entropy_loss, divergence_loss
from kvgraft.errors import KVGraftError
from kvgraft.models.head import Head

TOKENS, VOCABULARY, WIDTH = 11, 37, 8
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclasses.dataclass
class Sides:
    hidden: Tensor
    head: Head
    teacher: FullTarget

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.head.weight, self.head.bias) if t is not None]


def sides(bias: bool = False, scale: float = 1.0, softcap: float | None = None, vocabulary: int = VOCABULARY) -> Sides:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = draw(VOCABULARY, WIDTH).requires_grad_()
    head = Head(weight, draw(VOCABULARY).requires_grad_() if bias else None, scale, softcap)
    teacher = FullTarget(draw(TOKENS, 5), Head(2 * draw(vocabulary, 5)))
    return Sides(draw(TOKENS, WIDTH).requires_grad_(), head, teacher)


def plain_divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Rows of the generalised JSD by its definition, on probabilities in float64."""
    q, p = ((side.double() / temperature).softmax(-1) for side in (student, teacher))
    if beta == 0:
        return (p * (p / q).log()).sum(-1)
    if beta == 1:
        return (q * (q / p).log()).sum(-1)
    mixture = beta * p + (1 - beta) * q
    return beta * (p * (p / mixture).log()).sum(-1) + (1 - beta) * (q * (q / mixture).log()).sum(-1)


def require_equal(found: Callable[[], Tensor], expected: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Loss and every gradient within 1e-5 of the reference, relative to the largest entry."""
    results = []
    for loss in (found, expected):
        value = loss()
        # A factor as a weight puts it on: gradients made in the forward pass must be scaled by it.
        results.append([value.detach(), *torch.autograd.grad(3 * value, leaves, allow_unused=True)])
    for one, other in zip(*results, strict=True):
        assert other.abs().max() > 0
        assert float((one - other).abs().max() / other.abs().max()) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("form", [{}, {"bias": True, "scale": 0.3}, {"softcap": 2.0}])
def test_divergence_and_gradients_are_those_of_full_logits(beta: float, temperature: float, form: dict) -> None:
    s = sides(**form)
    require_equal(
        lambda: divergence_loss(s.hidden, s.head, s.teacher, beta=beta, temperature=temperature, chunk_tokens=4),
        lambda: plain_divergence(s.head.logits(s.hidden), s.teacher.logits(slice(None)), beta, temperature).mean(),
        s.leaves,
    )


@pytest.mark.parametrize("form", [{}, {"bias": True, "scale": 0.3}, {"softcap": 2.0}])
def test_cross_entropy_and_its_gradients_are_those_of_full_logits(form: dict) -> None:
    s = sides(**form)
    token_ids = torch.arange(TOKENS) * 5 % VOCABULARY
    require_equal(
        lambda: cross_entropy_loss(s.hidden, s.head, token_ids, chunk_tokens=4),
        lambda: F.cross_entropy(s.head.logits(s.hidden), token_ids),
        s.leaves,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_over_the_top_tokens_merges_the_rest(beta: float) -> None:
    s = sides()
    full = s.teacher.logits(slice(None)).log_softmax(-1)
    log_probs, ids = full.topk(6, -1)
    rest = full.scatter(-1, ids, -torch.inf).logsumexp(-1)

    def expected() -> Tensor:
        own = s.head.logits(s.hidden).log_softmax(-1)
        own_rest = (1 - own.gather(-1, ids).double().exp().sum(-1)).log()
        outcomes = torch.cat([own.gather(-1, ids).double(), own_rest[:, None]], -1)
        return plain_divergence(outcomes, torch.cat([log_probs, rest[:, None]], -1), beta, 1.0).mean()

    target = TopTarget(ids, log_probs, rest)
    require_equal(lambda: divergence_loss(s.hidden, s.head, target, beta=beta, chunk_tokens=4), expected, s.leaves)
    whole = divergence_loss(s.hidden, s.head, s.teacher, beta=beta)
    assert 0 < float(divergence_loss(s.hidden, s.head, target, beta=beta)) < float(whole)


def test_top_tokens_that_are_the_whole_vocabulary_give_the_full_divergence() -> None:
    s = sides()
    log_probs, ids = s.teacher.logits(slice(None)).log_softmax(-1).topk(VOCABULARY, -1)
    target = TopTarget(ids, log_probs, torch.full((TOKENS,), -torch.inf))
    require_equal(
        lambda: divergence_loss(s.hidden, s.head, target),
        lambda: divergence_loss(s.hidden, s.head, s.teacher),
        s.leaves,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_outcomes_and_certain_ones_give_no_nan(beta: float) -> None:
    hidden, head = torch.eye(3).requires_grad_(), Head((200 * torch.eye(3)).requires_grad_())
    teacher = FullTarget(torch.eye(3), Head(200 * torch.eye(3)))
    loss = divergence_loss(hidden, head, teacher, beta=beta)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(hidden.grad).all()


def test_how_tokens_are_chunked_makes_no_difference() -> None:
    s = sides()
    found = [float(divergence_loss(s.hidden, s.head, s.teacher, chunk_tokens=size)) for size in (1, 3, 11, 100)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)
    halves = sum(
        divergence_loss(s.hidden[part], s.head, FullTarget(s.teacher.hidden[part], s.teacher.head), num_tokens=TOKENS)
        for part in (slice(0, 4), slice(4, None))
    )
    assert float(halves) == pytest.approx(found[0], rel=1e-6)


def test_rows_that_pad_an_embedding_matrix_are_cut_and_other_vocabularies_refused() -> None:
    s = sides()
    teacher = FullTarget(s.teacher.hidden, Head(s.teacher.head.weight[: VOCABULARY - 5]))
    with pytest.raises(KVGraftError, match=r"student's vocabulary has 37 tokens and the teacher's 32: cut both"):
        divergence_loss(s.hidden, s.head, teacher)
    cut = s.head.cut(VOCABULARY - 5)
    divergence_loss(s.hidden, cut, teacher).backward()
    assert (s.head.weight.grad[-5:] == 0).all()
    assert (s.head.weight.grad[:-5] != 0).all()
    with pytest.raises(KVGraftError, match="names token 36 and the student's vocabulary has 32"):
        divergence_loss(s.hidden, cut, TopTarget(torch.full((TOKENS, 1), 36), torch.zeros(TOKENS, 1), torch.zeros(11)))


@pytest.mark.parametrize(("beta", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0)])
def test_settings_out_of_range_are_refused(beta: float, temperature: float) -> None:
    s = sides()
    with pytest.raises(KVGraftError, match="beta must lie in"):
        divergence_loss(s.hidden, s.head, s.teacher, beta=beta, temperature=temperature)


def test_no_token_gives_no_loss_and_half_precision_stays_close() -> None:
    s = sides()
    nothing = divergence_loss(s.hidden[:0], s.head, FullTarget(s.teacher.hidden[:0], s.teacher.head))
    nothing.backward()
    assert float(nothing) == 0
    half = s.hidden.detach().bfloat16().requires_grad_()
    loss = divergence_loss(half, s.head, s.teacher)
    loss.backward()
    assert half.grad.dtype == torch.bfloat16
    assert float(loss) == pytest.approx(float(divergence_loss(s.hidden, s.head, s.teacher)), rel=0.02)


@pytest.mark.parametrize("loss", ["divergence", "likelihood"])
def test_under_autocast_the_product_is_that_of_the_models_head(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = sides()
    token_ids = torch.arange(TOKENS) % VOCABULARY
    seen = []
    logits_of = Head.logits
    monkeypatch.setattr(
        Head, "logits", lambda head, hidden: seen.append((hidden.dtype, head.weight.dtype)) or logits_of(head, hidden)
    )

    def found() -> tuple[Tensor, list[Tensor]]:
        if loss == "divergence":
            value = divergence_loss(
                s.hidden, s.head, TopTarget(token_ids[:, None], torch.zeros(TOKENS, 1), torch.full((TOKENS,), -30.0))
            )
        else:
            value = -token_log_likelihood(s.hidden, s.head, token_ids, chunk_tokens=4).mean()
        return value, list(torch.autograd.grad(value, [s.hidden, s.head.weight]))

    plain, gradients = found()
    assert set(seen) == {(torch.float32, torch.float32)}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half, half_gradients = found()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert float(half.detach()) == pytest.approx(float(plain.detach()), rel=0.02)
    for one, other in zip(half_gradients, gradients, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.02


@pytest.mark.parametrize("vocabulary", [20, VOCABULARY, 50])
def test_sorted_probabilities_are_compared_with_zeros_for_what_is_missing(vocabulary: int) -> None:
    s = sides(vocabulary=vocabulary)

    def expected() -> Tensor:
        own = s.head.logits(s.hidden).div(2.0).softmax(-1).sort(-1, descending=True).values
        theirs = s.teacher.logits(slice(None)).div(2.0).softmax(-1).sort(-1, descending=True).values
        width = max(VOCABULARY, vocabulary)
        padded = [F.pad(side, (0, width - side.shape[-1])) for side in (own, theirs)]
        return (padded[0] - padded[1]).abs().sum(-1).mean()

    require_equal(
        lambda: sorted_probability_loss(s.hidden, s.head, s.teacher, temperature=2.0, chunk_tokens=4),
        expected,
        s.leaves,
    )


def test_sorted_top_probabilities_beyond_the_students_vocabulary_count() -> None:
    s = sides(vocabulary=60)
    log_probs, ids = s.teacher.logits(slice(None)).log_softmax(-1).sort(-1, descending=True)
    target = TopTarget(ids[:, :50], log_probs[:, :50], log_probs[:, 50:].logsumexp(-1))
    # The student's tokens are all compared, so that nothing is lost by the rest.
    require_equal(
        lambda: sorted_probability_loss(s.hidden, s.head, target),
        lambda: sorted_probability_loss(s.hidden, s.head, s.teacher),
        s.leaves,
    )


def test_sorted_top_probabilities_and_the_rest() -> None:
    s = sides(vocabulary=50)
    log_probs, ids = s.teacher.logits(slice(None)).log_softmax(-1).topk(5, -1)
    rest = (1 - log_probs.exp().sum(-1)).log()

    def expected() -> Tensor:
        own = s.head.logits(s.hidden).softmax(-1).topk(5, -1).values
        rests = (1 - own.sum(-1)) - rest.exp()
        return ((own - log_probs.exp()).abs().sum(-1) + rests.abs()).mean()

    target = TopTarget(ids, log_probs, rest)
    require_equal(lambda: sorted_probability_loss(s.hidden, s.head, target, chunk_tokens=4), expected, s.leaves)


@pytest.mark.parametrize("form", [{}, {"bias": True, "scale": 0.3, "softcap": 2.0}])
def test_likelihood_of_chunks_and_its_gradient(form: dict) -> None:
    s = sides(**form)
    token_ids = torch.arange(TOKENS) * 3 % VOCABULARY
    chunk = torch.arange(TOKENS) // 2
    teacher = -torch.rand(6, generator=torch.Generator().manual_seed(1)) * 8

    def found() -> Tensor:
        own = token_log_likelihood(s.hidden, s.head, token_ids, chunk_tokens=4)
        return chunk_likelihood_loss(own.new_zeros(6).index_add(0, chunk, own), teacher, temperature=20.0)

    def expected() -> Tensor:
        own = s.head.logits(s.hidden).double().log_softmax(-1)[torch.arange(TOKENS), token_ids]
        q = (own.new_zeros(6).index_add(0, chunk, own) / 20).exp()
        p = (teacher.double() / 20).exp()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()

    require_equal(found, expected, s.leaves)
    with torch.no_grad():
        once = token_log_likelihood(s.hidden, s.head, token_ids)
    assert torch.allclose(once, token_log_likelihood(s.hidden, s.head, token_ids, chunk_tokens=2), atol=1e-6)


def trl_jsd() -> Callable[..., Tensor]:
    """TRL's own loss; without the package, the test says so and is skipped."""
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError as error:
        pytest.skip(f"TRL with its GKD trainer is not installed ({error}); `pip install -e '.[benchmarks]'` brings it")
    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_is_that_of_trl(beta: float) -> None:
    loss = trl_jsd()
    s = sides()

    def expected() -> Tensor:
        # TRL's own mean is over the batch; here it is over tokens.
        logits = s.head.logits(s.hidden)[None], s.teacher.logits(slice(None))[None]
        return loss(*logits, beta=beta, temperature=1.5, reduction="sum") / TOKENS

    require_equal(lambda: divergence_loss(s.hidden, s.head, s.teacher, beta=beta, temperature=1.5), expected, s.leaves)
    assert "trl" in sys.modules
