"""A teacher's most likely tokens as one 32-bit word each: 128 bytes a token for the 32 most likely and the rest.

A word holds a token id in its high bits (16, or as many as the vocabulary needs) and a code in the low ones (16 for
vocabularies up to 65,536, 14 up to 262,144). Tokens are in falling order of probability. The code of a token is how
likely it is among itself and all that come after it, as log-odds on an even grid. So the mass of the rest needs no
place of its own, what is read back sums to one, and a small rest is kept as exactly (relatively) as a large one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvgraft.errors import StoreError

WORD_BYTES = 4
_WORD_BITS, _FEWEST_ID_BITS, _FEWEST_CODE_BITS = 32, 16, 10
# Log-odds beyond it are kept as it: shares of 4e-11 of what is left.
_LARGEST_LOG_ODDS = 24.0


def code_bits(vocabulary: int) -> int:
    """Bits of a word that are left for the code.

    Raises:
        StoreError: the vocabulary needs so many bits that too few are left (over 4 million tokens).
    """
    bits = _WORD_BITS - max(_FEWEST_ID_BITS, (vocabulary - 1).bit_length())
    if bits < _FEWEST_CODE_BITS:
        raise StoreError(f"log-probabilities of {vocabulary:,} tokens do not fit their words; at most 4,194,304 do")
    return bits


def pack_top(logits: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` most likely tokens of ``logits [tokens, vocabulary]`` as int32 words ``[tokens, top_k]``.

    Raises:
        StoreError: ``top_k`` is not below the vocabulary's size.
    """
    vocabulary = logits.shape[-1]
    if not 0 <= top_k < vocabulary:
        raise StoreError(f"top_k must be at least 0 and below the vocabulary's {vocabulary} tokens; got {top_k}")
    bits = code_bits(vocabulary)
    top, ids = logits.float().topk(top_k, -1)
    rest = logits.float().scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    # Mass of everything after each token, the rest included: a running log-sum from the end.
    after = torch.cat([rest, top.flip(-1)], -1).logcumsumexp(-1).flip(-1)[:, 1:]
    odds = (top - after).clamp(-_LARGEST_LOG_ODDS, _LARGEST_LOG_ODDS)
    steps = (1 << bits) - 1
    code = ((odds / (2 * _LARGEST_LOG_ODDS) + 0.5) * steps).round().long()
    word = (ids << bits) | code
    # The highest bit of a large id is the sign of an int32.
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int()


def unpack_top(words: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids int64 ``[..., top]``, their log-probabilities ``[..., top]``, and the rest's ``[...]``, float32."""
    bits = code_bits(vocabulary)
    unsigned = words.long() & 0xFFFFFFFF
    ids, code = unsigned >> bits, unsigned & ((1 << bits) - 1)
    odds = (code.float() / ((1 << bits) - 1) - 0.5) * (2 * _LARGEST_LOG_ODDS)
    taken, left = F.logsigmoid(odds), F.logsigmoid(-odds).cumsum(-1)
    log_probs = taken + F.pad(left, (1, 0))[..., :-1]
    rest = left[..., -1] if words.shape[-1] else left.new_zeros(left.shape[:-1])
    return ids, log_probs, rest
