"""Whole runs on a device of their own (tests/accelerator.py): nothing that a real one refuses, and the same results.

A card is rarely at hand. What would stop there, tensors left on the processor or float64 where there is none, stops
here too. The tests run again in processes of their own, since a device cannot be taken back.
"""

import subprocess
import sys
from pathlib import Path

import pytest

# Each in one process, which takes as long to start as some of the tests.
RUNS = {
    "training": [
        "test_run.py::test_run_folder_holds_everything",
        "distill/test_trainer.py::test_gradients_do_not_depend_on_accumulation[relational]",
        "distill/test_logit_arms.py::test_four_arms_from_one_recipe",
        "test_teachers.py::test_two_tokenizers_and_two_architectures_teach_one_student[learned]",
        "test_online.py::test_a_run_without_a_store",
        "store/test_quantize.py::test_kv_on_an_accelerator_gives_the_same_bits",
        "store/test_quantize.py::test_kv_on_apples_accelerator_is_worked_on_by_the_processor",
        "store/test_fill.py::test_kv_is_handed_over_where_the_model_is",
        "evaluate/test_run.py::test_everything_is_measured_and_written_without_touching_the_run",
    ],
    "projectors": [
        "fit/test_run.py::test_every_setting_goes_the_whole_way",
        "graft/test_worth.py::test_goes_the_whole_way_and_is_not_done_twice",
        "graft/test_chat.py::test_goes_on_from_the_documents_and_from_what_was_said",
        "graft/test_docs.py",
        "projector/test_closed_form.py::test_sums_on_an_accelerator_give_the_same_map",
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_on_a_device(name: str, tmp_path: Path) -> None:
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.accelerator", "-p", "no:xdist", "-x"]
    # A folder of its own, so that those of earlier tests are not looked through and removed.
    command += ["--basetemp", str(tmp_path / "runs")]
    done = subprocess.run(
        [*command, *(str(folder / test) for test in RUNS[name])],
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
