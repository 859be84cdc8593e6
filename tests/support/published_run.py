"""A folder as distill.py and probe.py leave it, with a tiny model in it and numbers that are made up."""

import json
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from raptor_hf import RaptorForDepthEstimation, RaptorForImageClassification, RaptorForSemanticSegmentation
from raptor_hf.hub.heads import save_head
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from tests.support.tiny_raptors import tiny_model

SETTINGS = {
    "teacher": "facebook/dinov2-small",
    "dataset": "uoft-cs/cifar10",
    "output_dir": "runs/tiny",
    "teacher_revision": None,
    "dataset_config": None,
    "dataset_revision": None,
    "train_split": "train",
    "test_split": "test",
    "stage1_steps": 10,
    "stage2_steps": 20,
    "batch_size": 8,
    "eval_images": None,
    "seed": 3,
}


def probe(metric: str, task: str, values: list[float], **fields: Any) -> dict[str, Any]:
    """An entry of metrics.json's "probes"."""
    return {
        "task": task,
        "dataset": "scene/parse",
        "dataset_config": None,
        "split": "validation",
        "num_images": 50,
        "metric": metric,
        "higher_is_better": metric != "rmse",
        "seeds": list(range(len(values))),
        "last": {metric: values},
        "best": {"epoch": [1] * len(values), metric: values},
        "epochs": 2,
        "init": "random",
        "head_parameters": 125,
        "seconds": 3.5,
        "command": "training/probe.py training/configs/probe/ade20k.yaml --model runs/tiny",
    } | fields


def metrics() -> dict[str, Any]:
    """metrics.json of a run with two probes."""
    return {
        "fidelity": {
            "r2": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95],
            "epsilon": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "relative_epsilon": [0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
            "cosine": {"cls": [0.9] * 6, "registers": None, "patches": [0.8] * 6},
            "agreement": 0.875,
            "teacher_accuracy": 0.9,
            "student_accuracy": 0.85,
        },
        "unreadable_images": {},
        "teacher": {"name": "facebook/dinov2-small", "revision": "0123abcd" * 5},
        "parameters": {"teacher": 22_000_000, "student": 7_000_000},
        "macs": {"teacher": 1_000_000, "student": 1_320_000},
        "seconds": {"phases": 2.0, "stage1": 60.0, "stage2": 90.0},
        "images_per_second": 1234.5,
        "seed": 3,
        "device": "NVIDIA H100",
        "versions": {"torch": "2.13.0"},
        "probes": {
            "ade20k": probe("mean_iou", "semantic-segmentation", [0.4, 0.42]),
            "nyu": probe("rmse", "depth-estimation", [0.6], dataset="sayakpaul/nyu_depth_v2"),
        },
        "quick_checks": {"uoft-cs/cifar10": {"knn_accuracy": 0.77, "knn_k": 20}},
    }


def save_run_folder(
    folder: Path, *, heads: bool = True, settings: dict[str, Any] | None = None, **numbers: Any
) -> Path:
    """Writes the folder, with a head for segmentation and one for depth beside that for classification."""
    classifier = tiny_model(RaptorForImageClassification, depth_conditioning="low_rank")
    classifier.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    RaptorImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    if heads:
        for variant, kind in (("ade20k", RaptorForSemanticSegmentation), ("nyu", RaptorForDepthEstimation)):
            head = tiny_model(kind, seed=1, depth_conditioning="low_rank")
            head.base_model.load_state_dict(classifier.base_model.state_dict())
            save_head(head, folder, variant)
    (folder / "metrics.json").write_text(json.dumps(metrics() | numbers))
    (folder / "resolved.yaml").write_text(yaml.safe_dump(SETTINGS | (settings or {})))
    (folder / "figures").mkdir()
    for name in ("phases", "fidelity", "losses", "probe-ade20k"):
        Figure(figsize=(1, 1)).savefig(folder / "figures" / f"{name}.png")
    # none of these is to be published
    (folder / "log.txt").write_text("step 1")
    (folder / "losses.json").write_text("{}")
    (folder / "head-orphan.safetensors").write_bytes(b"half written")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "config.json").write_text("{}")
    return folder
