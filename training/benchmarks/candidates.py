"""Ways to make a training step cheaper, each beside the step as it is; what won is the default, what did not is off.

benchmark.py calls this file and writes what it finds.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from raptor_hf.recipes.optimizers import make_optimizer

from .measuring import Comparison, alternate
from .training import OurStep, TrainingCase, build_steps


def _plain(case: TrainingCase) -> OurStep:
    return build_steps(case)[1]


def _unfolded(case: TrainingCase) -> OurStep:
    step = _plain(case)
    step.student.eval()  # no dropout, so the same mathematics
    return step


def _foreach(case: TrainingCase) -> OurStep:
    step = _plain(case)
    group = step.optimizer.param_groups[0]
    step.optimizer = torch.optim.AdamW(group["params"], lr=group["lr"], weight_decay=1e-4, foreach=True)
    return step


def _muon(case: TrainingCase) -> OurStep:
    step = _plain(case)
    rate = step.optimizer.param_groups[0]["lr"]
    step.optimizer = make_optimizer("muon", step.student, learning_rate=rate, weight_decay=1e-4, fused=True)
    return step


def _checkpointed(case: TrainingCase) -> OurStep:
    step = _plain(case)
    step.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return step


def _channels_last(case: TrainingCase) -> OurStep:
    step = _plain(case)
    step.teacher.model.embeddings.to(memory_format=torch.channels_last)
    step.images = step.images.contiguous(memory_format=torch.channels_last)
    return step


def _half_teacher(case: TrainingCase) -> OurStep:
    step = _plain(case)
    step.teacher.to(torch.bfloat16)
    return step


def _compiled(case: TrainingCase) -> OurStep:
    return _plain(replace(case, compile=True))


def _graphs(case: TrainingCase) -> OurStep:
    step = _plain(case)
    torch.compiler.reset()
    for block in step.student.base_model.encoder.blocks:
        block.compile(mode="reduce-overhead")
    return step


def _half(case: TrainingCase) -> OurStep:
    return _plain(replace(case, autocast=torch.bfloat16))


# name: how the step is made, and what became of it
CANDIDATES: dict[str, tuple[Callable[[TrainingCase], OurStep], str]] = {
    "LayerScale and depth scale on the outputs, not in the weights": (_unfolded, "the default has them in the weights"),
    "AdamW over lists of tensors, not fused": (_foreach, "the default is fused, on a CPU and on CUDA"),
    "patch embedding in channels-last": (_channels_last, "not taken"),
    "each block compiled": (_compiled, "an option, `--compile`"),
    "each block compiled, as CUDA graphs": (_graphs, "not taken"),
    "each block's activations recomputed": (_checkpointed, "an option for memory, `--gradient_checkpointing`"),
    "teacher in bf16": (_half_teacher, "an option, `--teacher_dtype bfloat16`"),
    "bf16 autocast": (_half, "an option, `--mixed_precision bf16`; the default of the GPU launch files"),
    "Muon instead of AdamW": (_muon, "the default of our own configs, for what it needs fewer steps"),
}


def compare_candidates(case: TrainingCase, repeats: int, warmup: int) -> list[dict[str, Any]]:
    """
    Time and saved activations of a step with each candidate, in turn with the step as it is.

    Args:
        case: the step as it is, eager, in fp32.
        repeats: repetitions that are timed.
        warmup: repetitions before these.

    Returns:
        a JSON-able row per candidate; `speedup` over the step as it is, `saved_ratio` of its saved activations, None
        for a compiled step, in which they are not seen, and under checkpoints, which keep theirs elsewhere.
    """
    default = _plain(case)
    # CUDA graphs need a GPU
    names = [name for name, (make, _) in CANDIDATES.items() if make is not _graphs or case.device.type == "cuda"]
    steps = {name: CANDIDATES[name][0](case) for name in names}
    times = alternate([default, *steps.values()], repeats=repeats, warmup=warmup, device=case.device)
    saved = default.saved_bytes()
    rows = []
    for index, (name, step) in enumerate(steps.items(), start=1):
        comparison = Comparison(times[0].tolist(), times[index].tolist())
        unseen = CANDIDATES[name][0] in (_compiled, _graphs, _checkpointed)
        rows.append(
            {
                "size": case.size,
                "batch_size": case.batch_size,
                "candidate": name,
                "outcome": CANDIDATES[name][1],
                **comparison.to_dict(),
                "saved_ratio": None if unseen else step.saved_bytes() / saved,
            }
        )
    return rows
