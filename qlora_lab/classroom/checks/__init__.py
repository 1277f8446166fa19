"""Exercise checks and progress.

A check takes the learner's answer and shows one line: not attempted yet (·), what is wrong (✗), or right (✓).

    >>> def weight_bytes(parameters, bits):
    ...     return parameters * bits
    >>> check_bytes_of_weights(weight_bytes)
    ✗ 0.1 weight_bytes(134515008, 32) gives 4,304,480,256, expected 538,060,032. These are bits: eight make a byte.

It never raises, unless QLORA_LAB_STRICT=1 is set: then everything but ✓ raises ExerciseUnsolved. Solved exercises are
noted in a small JSON file, and `progress()` shows them by item of the course's checklist.

To add a check, write a function from the answer to a Verdict in the notebook's module (n03.py), decorate it, and give
tests/classroom/answers/n03.py a right answer and the wrong ones it should recognize:

    @exercise("3.2", "level usage", item="nf4", points=2, todo="complete `level_usage`")
    def check_level_usage(level_usage):
        came = call(level_usage, codes)          # catches what the learner's code raises, and stubs
        if ...:
            return wrong("Your shares sum to 0.5. Which of the two codes in each byte is missing?")
        return right("...")

`check_level_usage(answer)` then shows, records and, in strict mode, raises; `check_level_usage.verdict(answer)` is the
pure function for the tests: it returns the Verdict and does nothing else.
"""

from . import n00, n01, n02, n03, n04, n05, n06, n07, n08, n09, n10, n11, n12, n13
from .judging import (
    CHECKLIST,
    TAUGHT_IN,
    Exercise,
    ExerciseUnsolved,
    Progress,
    Verdict,
    progress_path,
    read_progress,
    record,
)
from .n00 import check_bytes_of_weights, check_compute_dtype
from .n01 import check_12_gb, check_largest_model, check_logits, check_model_bytes
from .n02 import check_fixed_rows, check_smallest_block, check_zero_point
from .n03 import check_fingerprints, check_level_usage, check_normal_levels, check_suspects
from .n04 import (
    DISEASES,
    check_bits_per_parameter,
    check_diagnosis,
    check_triple_quantization,
    check_zero_point_cost,
    ill_restorations,
)
from .n05 import (
    LORA_BUGS,
    check_correction,
    check_largest_rank,
    check_lora_suspects,
    check_rank_of,
    lora_suspects,
)
from .n06 import (
    check_ill_layers,
    check_input_gradient,
    check_quantizable,
    check_short_version,
    ill_layers,
)
from .n07 import check_bnb_config, check_labels, check_token_weighted_loss, check_trainable_parameters
from .n08 import check_card_usage, check_fastest_preset, check_savings
from .n09 import check_claims, check_paired_difference, check_seeds_needed
from .n10 import check_accumulate, check_beyond_seeds, check_pack, check_splits
from .n11 import (
    check_adapters_that_fit,
    check_merged_weight,
    check_verdicts,
    check_which_base,
    unseen_configs,
)
from .n12 import check_faults, check_project, check_real_parameters
from .n13 import check_dequantize_kernel, check_floor, check_idle_share, check_norm_bytes

NOTEBOOKS = (n00, n01, n02, n03, n04, n05, n06, n07, n08, n09, n10, n11, n12, n13)


def all_exercises() -> tuple[Exercise, ...]:
    """The exercises of all notebooks, in the course's order."""
    return tuple(
        check.exercise for module in NOTEBOOKS for check in vars(module).values() if hasattr(check, "exercise")
    )


def progress() -> Progress:
    """Your progress: which exercises are solved, by item of the course's checklist."""
    try:
        solved = read_progress(progress_path())
    except OSError as error:
        print(f"· your progress could not be read ({error})")
        solved = set()
    return Progress(all_exercises(), frozenset(solved))


__all__ = [
    "CHECKLIST",
    "DISEASES",
    "Exercise",
    "ExerciseUnsolved",
    "LORA_BUGS",
    "Progress",
    "TAUGHT_IN",
    "Verdict",
    "all_exercises",
    "check_12_gb",
    "check_accumulate",
    "check_adapters_that_fit",
    "check_beyond_seeds",
    "check_bits_per_parameter",
    "check_bnb_config",
    "check_bytes_of_weights",
    "check_card_usage",
    "check_claims",
    "check_compute_dtype",
    "check_correction",
    "check_dequantize_kernel",
    "check_diagnosis",
    "check_fastest_preset",
    "check_faults",
    "check_fingerprints",
    "check_fixed_rows",
    "check_floor",
    "check_idle_share",
    "check_ill_layers",
    "check_input_gradient",
    "check_labels",
    "check_largest_model",
    "check_largest_rank",
    "check_level_usage",
    "check_logits",
    "check_lora_suspects",
    "check_merged_weight",
    "check_model_bytes",
    "check_norm_bytes",
    "check_normal_levels",
    "check_pack",
    "check_paired_difference",
    "check_project",
    "check_quantizable",
    "check_rank_of",
    "check_real_parameters",
    "check_savings",
    "check_seeds_needed",
    "check_short_version",
    "check_smallest_block",
    "check_splits",
    "check_suspects",
    "check_token_weighted_loss",
    "check_trainable_parameters",
    "check_triple_quantization",
    "check_verdicts",
    "check_which_base",
    "check_zero_point",
    "check_zero_point_cost",
    "ill_layers",
    "ill_restorations",
    "lora_suspects",
    "progress",
    "progress_path",
    "record",
    "unseen_configs",
]
