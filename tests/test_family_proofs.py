"""What a student of any family can do: half precision, learning, loading as remote code, running as ONNX."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raptor_hf.conversion import student_from_teacher, to_plain
from raptor_hf.distillation.start import fit_to_teacher
from raptor_hf.distillation.task import DistillationTask, TrajectoryLoss
from raptor_hf.phases import find_phases
from raptor_hf.similarity import SimilarityAccumulator
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import NUM_LAYERS, images
from tests.support.tiny_vits import STUDENTS, TWO_TOWERS, WITH_CLASSIFIER, own_hidden_states, own_inputs, tiny_vit

UNTIED = (1,) * NUM_LAYERS


@pytest.mark.parametrize("family", STUDENTS)
def test_in_bfloat16_the_untied_student_is_the_teacher_to_that_precision(family):
    student = student_from_teacher(tiny_vit(family), UNTIED, init="first").bfloat16()
    with torch.no_grad():
        states = torch.stack(student(images(), output_hidden_states=True).hidden_states, 1).float()
    exact = own_hidden_states(tiny_vit(family), images())
    rounded = Teacher(tiny_vit(family).bfloat16()).trajectory(images()).float()
    # no further from the exact states than the teacher itself is when it computes in bfloat16
    error, floor = ((got - exact).norm() / exact.norm() for got in (states, rounded))
    assert 0 < error < 1.3 * floor + 1e-3


@pytest.mark.parametrize("family", STUDENTS)
def test_twenty_steps_of_distillation_lower_the_loss(family):
    teacher = Teacher(tiny_vit(family))
    size = (28, 42) if family == "dinov3_vit" else (28, 28)
    states = teacher.trajectory(images(size, batch=4))
    similarity = SimilarityAccumulator(NUM_LAYERS, teacher.tokens)
    similarity.update(states)
    partition = find_phases(similarity.compute(), 2)
    student = student_from_teacher(teacher, partition, init="first", seed=0, depth_conditioning="low_rank").train()
    task = DistillationTask(student, TrajectoryLoss(tokens=teacher.tokens))
    optimizer = torch.optim.AdamW(student.encoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(21):
        losses.append(task(states, stage=2, image_size=size)["loss"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("branch_shifts", [False, True])
def test_blocks_without_biases_are_fitted_to_their_phase(branch_shifts):
    teacher, size = Teacher(tiny_vit("aimv2_vision_model")), (28, 42)
    options = {"init": "middle", "depth_conditioning": "low_rank", "branch_shifts": branch_shifts}
    start, fitted = (student_from_teacher(teacher, (2, 2), **options) for _ in range(2))
    with torch.no_grad():
        fit_to_teacher(teacher, fitted, [images(size, batch=8, seed=seed) for seed in range(4)])
    loss = TrajectoryLoss(tokens=teacher.tokens)
    states = teacher.trajectory(images(size, batch=8, seed=9))
    errors = [DistillationTask(s, loss).stage2_losses(states, image_size=size)["loss"] for s in (start, fitted)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("num_labels", [None, 3], ids=["backbone", "classifier"])
@pytest.mark.parametrize("family", STUDENTS)
def test_a_student_becomes_a_plain_model_of_its_family(family, num_labels):
    no_auto_class = family in TWO_TOWERS or family not in WITH_CLASSIFIER
    if num_labels is not None and no_auto_class:
        pytest.skip("transformers has no classification model of the vision tower alone")
    pixels = images((28, 42)).sigmoid()
    student = student_from_teacher(
        tiny_vit(family, num_labels), (3, 1), init="first", seed=0, depth_conditioning="low_rank", branch_shifts=False
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in student.base_model.encoder.conditioners.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    plain = to_plain(student)
    assert plain.config.model_type == family
    with torch.no_grad():
        own = student(pixels, output_hidden_states=True)
        theirs = plain(**own_inputs(plain, pixels))
    states = Teacher(plain).trajectory(pixels)
    torch.testing.assert_close(states, torch.stack(own.hidden_states, 1), rtol=1e-5, atol=2e-5)
    if num_labels is not None:
        torch.testing.assert_close(theirs.logits, own.logits, rtol=1e-4, atol=1e-4)
    elif student.config.pooling_type.startswith("attention"):
        torch.testing.assert_close(theirs.pooler_output, own.pooler_output, rtol=1e-4, atol=1e-4)


def test_what_a_family_cannot_be_is_said():
    vit = student_from_teacher(tiny_vit("vit"), (3, 1), ffn_type="swiglu")
    with pytest.raises(ValueError, match="ffn_type='swiglu' cannot become a 'vit' model, which has 'mlp'"):
        to_plain(vit)
    vit = student_from_teacher(tiny_vit("vit", num_labels=2), (3, 1))
    vit.classifier.weight.data.fill_(1.0)
    with pytest.raises(ValueError, match="the classifier reads more than"):
        to_plain(vit)
    conditioning = {"depth_conditioning": "low_rank", "branch_shifts": True}
    aimv2 = student_from_teacher(tiny_vit("aimv2_vision_model"), (3, 1), **conditioning)
    with pytest.raises(ValueError, match="branch_shifts=True cannot become layers whose attention.proj has no bias"):
        to_plain(aimv2)
    radio = student_from_teacher(tiny_vit("radio"), (3, 1))
    radio.embeddings.patch_embeddings.projection.bias.data += 1
    with pytest.raises(ValueError, match="the patch bias is not that of the model's own normalisation"):
        to_plain(radio)


REMOTE = """
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
sys.modules["raptor_hf"] = None  # importing it fails
root = Path(sys.argv[1])
inputs = load_file(root / "inputs")
outputs = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs[folder.name] = model(inputs[folder.name]).last_hidden_state.contiguous()
save_file(outputs, root / "outputs")
"""


@pytest.mark.slow
def test_students_of_every_family_load_where_raptor_hf_is_not_installed(tmp_path, monkeypatch):
    expected, inputs = {}, {}
    for family in STUDENTS:
        student = student_from_teacher(tiny_vit(family), (3, 1), init="first", depth_conditioning="low_rank")
        student.save_pretrained(tmp_path / family)
        inputs[family] = images()
        expected[family] = student(images()).last_hidden_state.detach()
    save_file(inputs, tmp_path / "inputs")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path.parent / "modules"))
    subprocess.run([sys.executable, "-c", REMOTE, str(tmp_path)], check=True, timeout=300)
    outputs = load_file(tmp_path / "outputs")
    assert outputs.keys() == expected.keys()
    for family, tokens in expected.items():
        torch.testing.assert_close(outputs[family], tokens, rtol=0, atol=1e-5, msg=family)


@pytest.mark.slow
@pytest.mark.parametrize("family", STUDENTS)
def test_onnx_equals_eager_without_branches_on_shapes(family, tmp_path: Path):
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    student = student_from_teacher(tiny_vit(family), (3, 1), init="first", depth_conditioning="low_rank")
    path, shapes = tmp_path / "model.onnx", {0: torch.export.Dim("batch", min=1, max=64)}
    rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
    shapes |= {2: 7 * rows, 3: 7 * columns}
    inputs = {"pixel_values": images()}
    torch.onnx.export(
        student, kwargs=inputs, f=path, dynamo=True, dynamic_shapes={"pixel_values": shapes}, verbose=False
    )
    assert not {"If", "Loop"} & {node.op_type for node in onnx.load(path).graph.node}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size, batch in (((28, 28), 2), ((42, 42), 1), ((28, 56), 3)):
        with torch.no_grad():
            expected = student(images(size, batch)).last_hidden_state
        outputs = session.run(None, {"pixel_values": images(size, batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(outputs[0]), expected, rtol=1e-4, atol=1e-4)
