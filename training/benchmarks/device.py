"""Benchmark: small on a device. Students beside their teachers as files: bytes, memory, start, latency, agreement.

    python -m training.benchmarks.device  # all but agreement, 20 minutes on one core; Linux
    python -m training.benchmarks.device --sizes vits14  # one size; the page keeps the others
    python -m training.benchmarks.device --parts agreement --students model_cards/digits-k3 \
        --teachers model_cards/digits-teacher --datasets digits

Parts: "latency", eight files of each size, which run alternately in one process, and each alone in a process of its own
for memory and start; "streamed", where weights come from memory or disk each time they are used; "start", from the
start of a process to its first output; "merged", a student with weights for each step, as DINOv2; "agreement", what
quantisation costs. Each writes a JSON file to output_dir, and all of them together README.md there. Weights of all but
the last are random, which does not change the speed.
"""

import ctypes
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from raptor_settings.declare import check_settings, setting
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from raptor_hf.conversion import to_dinov2
from raptor_hf.data.loaders import usable_cores
from raptor_hf.export.agreement import open_file
from raptor_hf.export.onnx_files import quantize_onnx, save_onnx
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment
from raptor_hf.recipes.settings import parse_settings, user_errors

from . import device_page
from .forward import TEACHER, build, images_of
from .measuring import Comparison, alternate
from .quantisation import compare_precisions
from .training import SHAPES

logger = logging.getLogger("device")

PARTS = ("latency", "streamed", "start", "merged", "agreement")
# the teacher, and the student of forward.py that has the most to compute
MODELS = {"teacher": TEACHER, "student": "mlp, low_rank"}
RUNTIMES = ("torch", "torch int8", "onnx", "onnx int8")
CPU = torch.device("cpu")
WEIGHTS = "weights.safetensors"
# madvise's MADV_PAGEOUT of Linux
PAGE_OUT = 21


@dataclass(frozen=True)
class DeviceSettings:
    """Measure students beside their teachers as files for small devices."""

    recipe: ClassVar[str] = "device"
    command: ClassVar[str] = "python -m training.benchmarks.device"
    example: ClassVar[str] = "--parts latency --sizes vits14"

    parts: list[str] = setting(list(PARTS[:-1]), help=f"parts, of {', '.join(PARTS)}", group="run")
    sizes: list[str] = setting(["vits14", "vitb14"], help="sizes of the models", group="teacher")
    batch_sizes: list[int] = setting([1, 8], help="batch sizes", unit="images", above=0, at_most=1024, group="images")
    repeats: int = setting(5, help="timings of each row", at_least=3, at_most=1000, group="run")
    num_processes: int = setting(
        2, help="processes of one thread that run at once", above=0, at_most=64, group="machine"
    )
    students: list[str] | None = setting(None, help="students whose agreement is measured", group="student")
    teachers: list[str] | None = setting(None, help="their teachers, in the same order", group="teacher")
    datasets: list[str] | None = setting(None, help="their images, in the same order", group="images")
    names: list[str] | None = setting(None, help="their names on the page; none takes those of folders", group="run")
    decoder: str | None = setting(
        None, help="weights of the decoder that reads saliency, for pairs without a classifier", group="teacher"
    )
    num_images: int | None = setting(
        None, help="images that agreement is measured on; none takes all", unit="images", above=0, group="images"
    )
    output_dir: str = setting("training/results/device", help="folder of the numbers and the page", group="run")

    def __post_init__(self) -> None:
        check_settings(self)
        for name, known in (("parts", PARTS), ("sizes", SHAPES)):
            values = getattr(self, name)
            if not values or any(value not in known for value in values):
                raise ValueError(f"{name} is {values}; it must hold some of {', '.join(known)}")
        lists = self.students, self.teachers, self.datasets
        if "agreement" in self.parts and (None in lists or len({len(each) for each in lists}) > 1):
            raise ValueError(f"students, teachers and datasets are {lists}; part agreement must have as many of each")


def main() -> None:
    settings = parse_settings(DeviceSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
    facts = describe_environment(CPU)
    if "agreement" in settings.parts:
        write_json(folder / "agreement.json", {"agreement": agreement(settings, folder), **facts})
    measured = {"latency": latency, "streamed": streamed, "start": start, "merged": merged}
    for part, size in [(part, size) for size in settings.sizes for part in measured if part in settings.parts]:
        with tempfile.TemporaryDirectory() as scratch:
            rows = measured[part](size, Path(scratch), settings)
        path = folder / f"{part}.json"
        others = json.loads(path.read_text())[part] if path.exists() else []
        write_json(path, {part: [row for row in others if row["size"] != size] + rows, **facts})
    there = {part: json.loads(path.read_text()) for part in PARTS if (path := folder / f"{part}.json").exists()}
    page = device_page.page(there)
    write_text_atomically(folder / "README.md", page)
    print(page)


def write_files(size: str, folder: Path) -> None:
    """Write a teacher and a student of random weights, each as weights of transformers, ONNX and ONNX in int8."""
    side = SHAPES[size]["image_size"]
    for name, kind in MODELS.items():
        model = build(size, kind)
        model.save_pretrained(folder / name)
        # DINOv2's positions have no open size
        save_onnx(model, folder / f"{name}.onnx", (side, side) if kind == TEACHER else None)
        quantize_onnx(folder / f"{name}.onnx", folder / f"{name}_int8.onnx", "int8_dynamic")
        logger.info("%s: wrote the %s", size, name)


def path_of(folder: Path, name: str, runtime: str) -> Path:
    """The file that holds a model's weights for a runtime."""
    if runtime.startswith("torch"):
        return folder / name / "model.safetensors"
    return folder / f"{name}{'_int8' if 'int8' in runtime else ''}.onnx"


def open_model(folder: Path, name: str, runtime: str) -> Callable[[Tensor], Any]:
    """A function from images to outputs, by one of `RUNTIMES`, in one thread."""
    path = path_of(folder, name, runtime)
    if not runtime.startswith("torch"):
        return open_file(path, num_threads=1)
    model = AutoModel.from_pretrained(folder / name).eval()
    if runtime == "torch int8":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return model


@torch.no_grad()
def latency(size: str, folder: Path, settings: DeviceSettings) -> list[dict[str, Any]]:
    """A row for each model, runtime and batch size; times are processor time in one process, in turn."""
    torch.set_num_threads(1)
    write_files(size, folder)
    cases = [(name, runtime) for name in MODELS for runtime in RUNTIMES]
    alone = {case: in_own_process(first_output, size, folder, *case) for case in cases}
    models = {case: open_model(folder, *case) for case in cases}
    rows = []
    for batch_size in settings.batch_sizes:
        images = images_of(size, batch_size)
        calls = [partial(model, images) for model in models.values()]
        times = alternate(calls, repeats=settings.repeats, warmup=not rows, device=CPU, clock=time.process_time)
        for case, own in zip(cases, times, strict=True):
            comparison = Comparison(times[0].tolist(), own.tolist())
            row = {"size": size, "model": case[0], "runtime": case[1], "batch_size": batch_size}
            row |= {"seconds": float(np.median(own)), "ratio": comparison.ratio}
            row |= {"ratio_quartiles": list(comparison.ratio_quartiles), "bytes": path_of(folder, *case).stat().st_size}
            rows.append(row | alone[case])
            logger.info("%s, batch %d, %s, %s: %.3f", size, batch_size, *case, comparison.ratio)
    return rows


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process, which shares the libraries that this one has loaded."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


@torch.no_grad()
def first_output(size: str, folder: Path, name: str, runtime: str) -> dict[str, float]:
    """Seconds from a file that is not in memory to the first output, and the memory that it and a second one take."""
    torch.set_num_threads(1)
    images = images_of(size, 1)
    drop_from_memory(path_of(folder, name, runtime))
    # start the high-water mark of this process anew
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    began = time.perf_counter()
    model = open_model(folder, name, runtime)
    model(images)
    seconds = time.perf_counter() - began
    model(images)
    return {"start_seconds": seconds, "peak_bytes": _memory("VmHWM") - before}


def drop_from_memory(path: Path) -> None:
    """Have the operating system forget what it has read of a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory(name: str) -> int:
    """Bytes that /proc says of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def streamed(size: str, folder: Path, settings: DeviceSettings) -> list[dict[str, Any]]:
    """Time of the student over the teacher's, in PyTorch, where reading weights is most of the work.

    "few tokens": one image of four patches, so that a weight is used for nine tokens when it is read. "processes": the
    same in several processes at once. "memory-mapped": the file is the memory, whose pages are dropped before each
    pass.
    """
    for name, kind in MODELS.items():
        save_weights(build(size, kind), folder / name)
    rows = []
    for what in ("few tokens", "processes", "memory-mapped"):
        workers = settings.num_processes if what == "processes" else 1
        arguments = [(size, folder, what == "memory-mapped", settings.repeats)] * workers
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            pairs = pool.starmap(few_tokens, arguments, chunksize=1)
        teacher, student = np.concatenate(pairs, axis=1)
        row = {"size": size, "what": what, "num_processes": workers, "num_cores": usable_cores()}
        rows.append(row | compared(teacher=teacher, student=student))
        logger.info("%s, %s: %.3f", size, what, rows[-1]["ratio"])
    return rows


def compared(**seconds: np.ndarray) -> dict[str, Any]:
    """Median seconds of two, and median and quartiles of the second's over the first's, pair by pair."""
    comparison = Comparison(*(own.tolist() for own in seconds.values()))
    medians = {f"{name}_seconds": float(np.median(own)) for name, own in seconds.items()}
    return {**medians, "ratio": comparison.ratio, "ratio_quartiles": list(comparison.ratio_quartiles)}


def start(size: str, folder: Path, settings: DeviceSettings) -> list[dict[str, Any]]:
    """Seconds by the clock from the start of a process to its first output, for both runtimes of ONNX files."""
    write_files(size, folder)
    script, side = Path(__file__).with_name("cold_start.py"), SHAPES[size]["image_size"]
    rows = []
    for runtime in ("onnx", "onnx int8"):
        paths = [path_of(folder, name, runtime) for name in MODELS]
        seconds = np.zeros((2, settings.repeats))
        for repeat in range(settings.repeats):
            for index in (0, 1) if repeat % 2 else (1, 0):
                drop_from_memory(paths[index])
                began = time.perf_counter()
                subprocess.run([sys.executable, str(script), str(paths[index]), str(side)], check=True)
                seconds[index, repeat] = time.perf_counter() - began
        rows.append({"size": size, "runtime": runtime, **compared(teacher=seconds[0], student=seconds[1])})
        logger.info("%s, start, %s: %.3f", size, runtime, rows[-1]["ratio"])
    return rows


@torch.no_grad()
def merged(size: str, folder: Path, settings: DeviceSettings) -> list[dict[str, Any]]:
    """Processor time of a student, and of the DINOv2 into whose layers its terms of each step are merged, in turn."""
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        student = build(size, MODELS["student"])
        models = [model.to(dtype) for model in (student, to_dinov2(student))]
        for batch_size in settings.batch_sizes:
            images = images_of(size, batch_size).to(dtype)
            calls = [partial(model, images) for model in models]
            times = alternate(calls, repeats=settings.repeats, warmup=1, device=CPU, clock=time.process_time)
            row = {"size": size, "dtype": str(dtype).removeprefix("torch."), "batch_size": batch_size}
            rows.append(row | compared(student=times[0], merged=times[1]))
            logger.info("%s, merged, %s, batch %d: %.3f", size, row["dtype"], batch_size, rows[-1]["ratio"])
    return rows


@torch.no_grad()
def few_tokens(size: str, folder: Path, page_out: bool, repeats: int) -> np.ndarray:
    """Seconds of the teacher and the student on one image of two by two patches, (2, repeats), in turn."""
    torch.set_num_threads(1)
    side = 2 * SHAPES[size]["patch_size"]
    images = torch.randn(1, 3, side, side)
    models = [mapped_model(folder / name) for name in MODELS]
    seconds = np.zeros((2, repeats if page_out else 10 * repeats))
    for repeat in range(-1, seconds.shape[1]):
        for index in (0, 1) if repeat % 2 else (1, 0):
            if page_out:
                drop_pages(models[index])
            # reading from a disk is no processor time
            clock = time.perf_counter if page_out else time.process_time
            began = clock()
            models[index](images)
            if repeat >= 0:
                seconds[index, repeat] = clock() - began
    return seconds


def save_weights(model: nn.Module, folder: Path) -> None:
    """Save a model under the names that its parameters have in memory, which transformers may change in its files."""
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)


def mapped_model(folder: Path) -> nn.Module:
    """A model whose weights are the pages of the file of `save_weights`."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    return model.eval()


def drop_pages(model: nn.Module) -> None:
    """Have the operating system forget the pages of a mapped model."""
    page = os.sysconf("SC_PAGE_SIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    for parameter in model.parameters():
        start = parameter.data_ptr() // page * page
        length = parameter.data_ptr() + parameter.nbytes - start
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), PAGE_OUT):
            raise OSError(ctypes.get_errno(), "madvise refuses to drop pages; Linux 5.4 or newer does it")


def agreement(settings: DeviceSettings, folder: Path) -> list[dict[str, Any]]:
    """Rows of `compare_precisions` for all pairs, in place of earlier ones of the same names."""
    path = folder / "agreement.json"
    rows = json.loads(path.read_text())["agreement"] if path.exists() else []
    pairs = zip(settings.students, settings.teachers, settings.datasets, strict=True)
    for index, (student, teacher, dataset) in enumerate(pairs):
        name = settings.names[index] if settings.names else Path(student).name
        found = compare_precisions(student, teacher, dataset, decoder=settings.decoder, num_images=settings.num_images)
        rows = [row for row in rows if row["name"] != name] + [{"name": name, **row} for row in found]
        logger.info("%s: %s", name, ", ".join(f"{row['precision']} {row['agreement']:.4f}" for row in found))
    return rows


if __name__ == "__main__":
    main()
