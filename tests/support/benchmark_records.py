"""Made-up records of the benchmark, of every part, as its JSON files hold them."""

from typing import Any

FACTS = {
    "device_type": "cpu",
    "num_threads": 2,
    "device": "a processor, 2 threads",
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
}


def training_row(**changes: Any) -> dict[str, Any]:
    """Of one comparison of steps: ViT-S/14, batch 8, all targets of CPUs met."""
    row = {
        "size": "vits14",
        "batch_size": 8,
        "ffn_type": "mlp",
        "stage": "2",
        "precision": "float32",
        "compiled": False,
        "seconds": {"reference": 2.4, "ours": 2.0},
        "speedup": 1.2,
        "speedup_quartiles": [1.19, 1.21],
        "repeats": 15,
        "images_per_second": {"reference": 3.3, "ours": 4.0},
        "saved_bytes": {"reference": 1000, "ours": 700},
        "flops": {"reference": 10**11, "ours": 10**11},
        "matmul_peak": {"reference": 6e10, "ours": 6e10},
        "mfu": {"reference": 0.7, "ours": 0.84},
        "loss_difference": 3e-7,
    }
    return row | changes


def forward_row(**changes: Any) -> dict[str, Any]:
    """Of one student beside the teacher: ViT-S/14, batch 8, a little slower than it."""
    row = {
        "size": "vits14",
        "batch_size": 8,
        "student": "mlp",
        "precision": "float32",
        "compiled": False,
        "teacher_seconds": 0.50,
        "seconds": 0.51,
        "ratio": 1.02,
        "ratio_quartiles": [1.01, 1.025],
        "images_per_second": 15.7,
        "repeats": 15,
    }
    return row | changes


def training_record(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Of the part "training"."""
    record = {
        "training": list(rows) or [training_row(), training_row(size="digits", speedup=1.5)],
        "left_out": ["vitb14, batch 64, float32: about 99 s a call"],
    }
    return record | FACTS | changes


def forward_record(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Of the part "forward"."""
    students = ("mlp", "mlp, low_rank", "swiglu, scale")
    record = {
        "forward": list(rows) or [forward_row(student=student) for student in students],
        "left_out": [],
    }
    return record | FACTS | changes


def growth_record(**changes: Any) -> dict[str, Any]:
    """Of the part "growth"."""
    slopes = {"time_slope": 1.1, "time_slope_at_the_end": 1.2, "memory_slope": 1.0, "flops_slope": 1.05}
    record = {
        "growth": [
            {"symbol": "L", "base": 12, "points": [{"x": x, "time_ratio": x / 12} for x in (6, 12, 24)], **slopes},
            {"symbol": "B", "base": 8, "points": [{"x": x, "time_ratio": x / 8} for x in (2, 8)], **slopes},
        ],
        "phases": {
            "num_blocks": 8,
            "points": [{"x": 12, "seconds": 0.001}, {"x": 1000, "seconds": 0.5}],
            "time_slope_at_the_end": 1.9,
        },
    }
    return record | FACTS | changes


def input_record(**changes: Any) -> dict[str, Any]:
    """Of the part "input", with one file that was not there."""
    record = {
        "input": [
            {
                "source": "cifar10-train.parquet",
                "batch_size": 128,
                "image_size": [32, 32],
                "num_cores": 2,
                "workers": [{"num_workers": number, "images_per_second": 900.0} for number in (0, 1, 2)],
                "split": {"read": 20.0, "decode": 80.0, "total": 130.0},
            },
            {"source": "imagenet-sample.parquet", "skipped": "data/imagenet-sample.parquet is not there"},
        ],
    }
    return record | FACTS | changes


def all_records() -> dict[str, dict[str, Any]]:
    """Of every part, by its name."""
    return {
        "forward": forward_record(),
        "training": training_record(),
        "growth": growth_record(),
        "input": input_record(),
    }
