"""A run folder goes to a Hub over HTTP and comes back, by the real client and the real from_pretrained."""

import getpass
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

from raptor_hf.configuration_raptor import AUTO_MAP
from raptor_hf.hub import publication
from raptor_hf.hub.heads import list_heads
from raptor_hf.hub.privacy import blot_tokens
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.modeling_raptor import CODE_FILES, RaptorBackbone
from tests.support.hub_server import HubServer, Repo
from tests.support.published_run import metrics, save_run_folder
from tests.support.tiny_raptors import tiny_images
from training import publish

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "secret" * 5
REPO = "alice/tiny"
VARIANTS = {
    "teacher": AutoModelForImageClassification,
    "ade20k": AutoModelForSemanticSegmentation,
    "nyu": AutoModelForDepthEstimation,
}


@pytest.fixture
def hub():
    with HubServer(TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """A run folder that no test changes."""
    return save_run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run_publish(hub, monkeypatch, capfd, tmp_path):
    """Runs publish.py in this process against the server; exit status and what was printed, which is never secret."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def call(folder: Path, *arguments: str, repo_id: str = REPO) -> tuple[int, str]:
        flags = [str(folder), "--repo-id", repo_id, "--license", "apache-2.0", *arguments]
        monkeypatch.setattr(sys, "argv", ["publish.py", *flags])
        status = 0
        try:
            publish.main()
        except SystemExit as stop:
            status = stop.code
        printed = capfd.readouterr()
        for secret in (TOKEN, "signature-of-the-upload", "Traceback"):
            assert secret not in printed.out + printed.err
        if status:
            assert status == 2
            assert re.fullmatch(r"publish\.py: error: [^\n]+\n", printed.err.split("\r")[-1].splitlines(True)[-1])
        return status, printed.out + printed.err

    return call


# run in a fresh process with an empty cache
LOAD = """
import re, sys
from pathlib import Path
mode, repo, folder = sys.argv[1:]
if mode == "remote":
    sys.modules["raptor_hf"] = None  # importing it fails
else:
    import raptor_hf
import torch, transformers
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.auto.image_processing_auto import AutoImageProcessor

options = {"trust_remote_code": True} if mode == "remote" else {}
images = load_file(folder + "/images")["images"]
outputs = {}
with torch.no_grad():
    outputs["none"] = transformers.AutoModel.from_pretrained(repo, **options)(images).last_hidden_state
    outputs["backbone"] = transformers.AutoBackbone.from_pretrained(repo, **options).eval()(images).feature_maps[0]
    tasks = {"teacher": "ImageClassification", "ade20k": "SemanticSegmentation", "nyu": "DepthEstimation"}
    for variant, task in tasks.items():
        auto_class = getattr(transformers, "AutoModelFor" + task)
        model, report = auto_class.from_pretrained(repo, variant=variant, output_loading_info=True, **options)
        assert not any(report.values()), report
        source = "transformers_modules." if mode == "remote" else "raptor_hf."
        assert type(model).__module__.startswith(source), type(model)
        outputs[variant] = model(images).to_tuple()[0]
processor = AutoImageProcessor.from_pretrained(repo, **options)
assert type(processor).__name__ == "RaptorImageProcessor"
outputs["pixels"] = processor(Image.radial_gradient("L").resize((40, 24)), return_tensors="pt")["pixel_values"]
save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, f"{folder}/{mode}")
blocks = re.findall("```python\\n(.*?)```", Path(hf_hub_download(repo, "README.md")).read_text(), re.DOTALL)
scope = {}
exec(blocks[mode == "remote"], scope)  # what the card shows
assert scope["model"].config.model_type == "raptor"
"""


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | settings | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.mark.slow  # starts a process that imports everything
def test_the_command_publishes_in_one_commit(hub, shared_run, tmp_path):
    command = [sys.executable, "training/publish.py", str(shared_run), "--repo-id", REPO, "--license", "apache-2.0"]
    variables = environment(hub, tmp_path / "home") | {"HF_TOKEN": TOKEN}
    published = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert published.returncode == 0, published.stderr
    assert TOKEN not in published.stdout + published.stderr
    assert f"{hub.url}/{REPO}/commit/" in published.stdout
    assert len(hub.repos[REPO].commits) == 2  # the Hub's own, and one for all files


@pytest.mark.parametrize("mode", ["remote", pytest.param("installed", marks=pytest.mark.slow)])
def test_published_model_loads_in_a_fresh_process_to_the_bit(mode, hub, shared_run, run_publish, tmp_path):
    assert run_publish(shared_run)[0] == 0
    images = tiny_images()
    save_file({"images": images}, tmp_path / "images")
    result = subprocess.run(
        [sys.executable, "-c", LOAD, mode, REPO, str(tmp_path)],
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    loaded = load_file(tmp_path / mode)
    with torch.no_grad():
        expected = {
            "none": AutoModel.from_pretrained(shared_run)(images).last_hidden_state,
            "backbone": RaptorBackbone.from_pretrained(shared_run).eval()(images).feature_maps[0],
        }
        for variant, auto_class in VARIANTS.items():
            expected[variant] = auto_class.from_pretrained(shared_run, variant=variant)(images).to_tuple()[0]
    processor = RaptorImageProcessor.from_pretrained(shared_run)
    image = Image.radial_gradient("L").resize((40, 24))
    expected["pixels"] = processor(image, return_tensors="pt")["pixel_values"]
    assert loaded.keys() == expected.keys()
    for name, output in expected.items():
        assert torch.equal(loaded[name], output), name


def test_dry_run_prints_exactly_what_is_uploaded_then(hub, shared_run, run_publish):
    status, printed = run_publish(shared_run, "--dry-run")
    assert status == 0 and "nothing was uploaded" in printed
    assert hub.repos == {} and hub.blobs == {}
    listed = {
        path: int(size.replace(",", "")) for size, path in re.findall(r"^ *([\d,]+)  (\S+)$", printed, re.MULTILINE)
    }
    assert run_publish(shared_run)[0] == 0
    assert {path: len(data) for path, data in hub.files(REPO).items()} == listed
    assert set(listed) == {
        *("README.md", "config.json", "preprocessor_config.json", "metrics.json", "resolved.yaml", *CODE_FILES),
        *("model.safetensors", "head-ade20k.safetensors", "head-nyu.safetensors", "head-teacher.safetensors"),
        *(f"model.safetensors.index.{variant}.json" for variant in VARIANTS),
        *(f"figures/{name}.png" for name in ("phases", "fidelity", "losses", "probe-ade20k")),
    }
    assert json.loads(hub.files(REPO)["config.json"])["auto_map"] == AUTO_MAP


def test_publishing_again_commits_nothing_and_a_smaller_model_removes_the_rest(hub, shared_run, run_publish, tmp_path):
    run_publish(shared_run)
    hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["notes.txt"] = b"not ours"
    head = hub.repos[REPO].branches["main"]
    status, printed = run_publish(shared_run)
    assert status == 0 and "nothing has changed" in printed
    assert hub.repos[REPO].branches["main"] == head
    smaller = save_run_folder(tmp_path / "smaller", heads=False, probes={})
    status, printed = run_publish(smaller)
    assert status == 0 and "removed  head-nyu.safetensors" in printed
    assert len(hub.repos[REPO].commits) == 3
    assert not [path for path in hub.files(REPO) if path.startswith("head-") or ".index." in path]
    assert hub.files(REPO)["notes.txt"] == b"not ours"


FAULTS = [
    ("GET", "/whoami-v2", 401, "token is not valid"),
    ("POST", "/repos/create", 403, "write access"),
    ("POST", "/preupload/", 401, "token is not valid"),
    ("POST", "/commit/", 403, "write access"),
    ("PUT", "/lfs/", 403, "write access"),
    ("POST", "/repos/create", 500, "answered 500"),
    ("POST", "/preupload/", 500, "answered 500"),
    ("PUT", "/lfs/", 500, "answered 500"),
    ("POST", "/commit/", 500, "answered 500"),
    ("POST", "/objects/batch", None, "no answer"),
    ("PUT", "/lfs/", None, "no answer"),
    ("POST", "/commit/", None, "no answer"),
]


@pytest.mark.parametrize("method, path, status, message", FAULTS, ids=lambda value: str(value).strip("/"))
def test_an_upload_that_fails_leaves_nothing_half_and_is_mended_by_the_same_command(
    method, path, status, message, hub, shared_run, run_publish
):
    older = {"config.json": b'{"model_type": "raptor"}', "head-old.safetensors": b"old", "model.safetensors": b"older"}
    if path != "/repos/create":
        hub.repos[REPO] = Repo(private=False)
        hub.repos[REPO].commit("main", older)
    hub.fail(method, path, status=status, times=99)
    code, printed = run_publish(shared_run)
    assert code == 2 and message in printed
    assert REPO not in hub.repos if path == "/repos/create" else hub.files(REPO) == older
    hub.faults.clear()
    assert run_publish(shared_run)[0] == 0
    files = hub.files(REPO)
    assert files["model.safetensors"] == (shared_run / "model.safetensors").read_bytes()
    assert {"README.md", "head-nyu.safetensors", *CODE_FILES} <= files.keys() and "head-old.safetensors" not in files


@pytest.mark.parametrize("kind", [RuntimeError, ConnectionError, TimeoutError])
def test_a_failure_inside_xet_is_one_line_without_its_text(kind, hub, shared_run, run_publish, monkeypatch):
    def broken(*args, **kwargs):
        raise kind("PUT https://host/x?X-Amz-Signature=signature-of-the-upload from /home/someone/x")

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", broken)
        status, printed = run_publish(shared_run)
    assert status == 2 and f"broke off ({kind.__name__})" in printed and "give the same command again" in printed
    assert "Amz" not in printed and "/home/" not in printed
    assert run_publish(shared_run)[0] == 0


def test_a_failure_of_work_done_here_keeps_its_traceback(shared_run, run_publish, monkeypatch):
    def broken(folder):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(publication, "check_weights", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_publish(shared_run, "--dry-run")


@pytest.mark.parametrize("method, path, status", [("PUT", "/lfs/", 500), ("PUT", "/lfs/", None)])
def test_an_upload_outlives_one_passing_failure(method, path, status, hub, shared_run, run_publish):
    hub.fail(method, path, status=status)
    assert run_publish(shared_run)[0] == 0
    assert "model.safetensors" in hub.files(REPO)


def test_branch_and_pull_request_leave_main_alone(hub, shared_run, run_publish):
    assert run_publish(shared_run, "--revision", "v2", "--private")[0] == 0
    assert hub.repos[REPO].private
    assert hub.files(REPO) == {} and "model.safetensors" in hub.files(REPO, "v2")
    assert b'from_pretrained("alice/tiny", revision="v2")' in hub.files(REPO, "v2")["README.md"]
    status, printed = run_publish(shared_run, "--create-pr")
    assert status == 0 and "/discussions/1" in printed
    (proposed,) = hub.repos[REPO].pull_requests
    assert hub.files(REPO) == {} and "model.safetensors" in hub.files(REPO, proposed)
    status, printed = run_publish(shared_run, "--create-pr", "--revision", "nowhere")
    assert status == 2 and "no branch 'nowhere'" in printed


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)], ids=["upload", "dry run"])
def test_what_would_fail_later_fails_before_anything_is_sent(
    arguments, hub, shared_run, run_publish, monkeypatch, tmp_path
):
    def refused(message: str, folder: Path = shared_run, **options: str) -> None:
        status, printed = run_publish(folder, *arguments, **options)
        assert status == 2 and message in printed, printed
        assert not [
            request for request in hub.requests if request[0] in ("POST", "PUT") and "validate" not in request[1]
        ]

    for illegal in ("alice/ti ny", "alice/tiny..x", "alice/-tiny", "tiny", "a/b/c", "alice/" + "x" * 120):
        refused("repo_id" if "/" not in illegal[6:] else "ORG/NAME", repo_id=illegal)
    refused("may write to these only: alice", repo_id="bob/tiny")
    refused("may write to these only: alice", repo_id="readers/tiny")
    hub.role = "read"
    refused("the token may only read")
    hub.role = "fineGrained"
    for hub.scopes in ({}, {REPO: ["repo.content.read"]}, {"alice/other": ["repo.write"], "readers": ["repo.write"]}):
        refused("fine-grained one that may not write to alice/tiny")
    hub.role = "write"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(publish, "get_token", lambda: None)
    if arguments:  # a dry run goes on without
        status, printed = run_publish(shared_run, *arguments)
        assert status == 0 and "left  there is no token for the Hub" in printed and "all checks passed but" in printed
    else:
        refused("there is no token")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(publish, "get_token", lambda: TOKEN)

    repo = hub.repos[REPO] = Repo(private=False)
    repo.commit("main", {"config.json": b'{"model_type": "bert"}'})
    refused("model of type 'bert'")
    repo.commit("main", {"pytorch_model.bin": b""})
    refused("pytorch_model.bin and no Raptor")
    repo.commit("main", {"README.md": b""})
    status, printed = run_publish(shared_run, "--private", *arguments)
    assert status == 2 and "is public" in printed
    del hub.repos[REPO]

    broken = save_run_folder(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(iter(weights))
    for content, message in (
        (weights | {name: torch.full_like(weights[name], torch.nan)}, "NaN or infinite"),
        ({key: value for key, value in weights.items() if key != name}, name.removeprefix("raptor.")),
    ):
        save_file(content, broken / "model.safetensors", {"format": "pt"})
        refused(message, broken)
    (broken / "model.safetensors").write_bytes(b"\0" * 7)
    refused("damaged", broken)


@pytest.mark.parametrize("scope", ["alice", REPO])
def test_a_fine_grained_token_that_covers_the_repository_publishes(scope, hub, shared_run, run_publish):
    if scope == REPO:
        hub.repos[REPO] = Repo(private=False)
        hub.repos[REPO].commit("main", {})
    hub.role, hub.scopes = "fineGrained", {scope: ["repo.content.read", "repo.write"]}
    assert run_publish(shared_run)[0] == 0
    assert "model.safetensors" in hub.files(REPO)


def test_a_folder_that_is_not_here_is_not_linked_as_a_data_set_of_the_hub(hub, run_publish, tmp_path):
    folder = save_run_folder(tmp_path / "run", heads=False, probes={}, settings={"dataset": "data/photos"})
    assert run_publish(folder)[0] == 0
    assert "datasets" not in yaml.safe_load(hub.files(REPO)["README.md"].split(b"---")[1])


def test_the_name_and_the_text_of_an_unusual_licence_are_the_teachers(tmp_path):
    names = {"license": "other", "license_name": "deep-lake", "license_link": "LICENSE"}
    (tmp_path / "README.md").write_text("---\n" + yaml.safe_dump(names) + "---\n")
    link = "https://huggingface.co/meta/teacher/blob/main/LICENSE"
    assert publication.license_of(str(tmp_path), "meta/teacher") == names | {"license_link": link}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert publication.license_of(str(tmp_path), None) == {"license": "mit"}


def test_the_licence_is_the_teachers_own_or_none(tmp_path):
    assert publication.license_of(str(tmp_path), None) == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n")
    assert publication.license_of(str(tmp_path), None) == {}
    for bad in ({"license": "mit\nbase_model: evil/x"}, {"license": "other", "license_name": "<script>"}):
        (tmp_path / "README.md").write_text("---\n" + yaml.safe_dump(bad) + "---\n")
        with pytest.raises(ValueError, match="it must be"):
            publication.license_of(str(tmp_path), None)


def test_a_student_of_dinov3_comes_under_its_licence_by_name(tmp_path):
    # the front matter of facebook/dinov3-vits16-pretrain-lvd1689m
    link = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
    names = {"license": "other", "license_name": "dinov3-license", "license_link": link}
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").write_text("---\n" + yaml.safe_dump(names) + "---\n")
    assert publication.license_of(str(tmp_path / "teacher"), None) == names


def test_a_licence_of_two_lines_is_refused(hub, shared_run, run_publish):
    status, printed = run_publish(shared_run, "--license", "mit\nbase_model: evil/x")
    assert status == 2 and "license is" in printed and "identifier" in printed and hub.repos == {}


@pytest.mark.parametrize("name", ["metrics.json", "resolved.yaml", "config.json", "phases.json"])
@pytest.mark.parametrize(
    "content", ["[1, 2]", '"text"', "", "null", '{"a":' * 2000 + "1" + "}" * 2000, "\x00", '{"a": ']
)
def test_a_file_that_is_no_object_is_one_line(name, content, run_publish, tmp_path):
    folder = save_run_folder(tmp_path / "run", heads=False, probes={})
    (folder / name).write_text(content)
    status, printed = run_publish(folder, "--dry-run")
    assert status == 2 and name in printed


def test_aliases_that_multiply_are_one_line(run_publish, tmp_path):
    folder = save_run_folder(tmp_path / "run", heads=False, probes={})
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join(['*' + a] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (folder / "resolved.yaml").write_text("\n".join(lines))
    status, printed = run_publish(folder, "--dry-run")
    assert status == 2 and "resolved.yaml: it holds more than" in printed


@pytest.mark.parametrize(
    ("numbers", "settings", "said"),
    [
        ({"blocks": [[1, 2, 3], [4, 5, 6]]}, {}, "of the blocks"),
        ({}, {"num_blocks": 4}, "of the number of blocks, config.json says 3 and resolved.yaml says 4"),
        ({}, {"block_repeats": [2, 2, 2]}, "of the layers per block"),
        ({"seed": 4}, {}, "of the seed"),
        ({"teacher": {"name": "other/vit"}}, {}, "of the teacher"),
        ({"backbone": "0" * 64}, {}, "of the backbone's weights"),
    ],
)
def test_files_of_different_runs_are_refused(numbers, settings, said, hub, run_publish, tmp_path):
    folder = save_run_folder(tmp_path / "run", heads=False, probes={}, settings=settings, **numbers)
    status, printed = run_publish(folder)
    assert status == 2 and "different runs" in printed and said in printed and hub.repos == {}


def test_files_of_different_run_ids_are_refused(hub, run_publish, tmp_path):
    folder = save_run_folder(tmp_path / "run", heads=False, probes={}, run_id="a")
    settings = (folder / "resolved.yaml").read_text()
    (folder / "resolved.yaml").write_text("# run_id: b\n" + settings)
    status, printed = run_publish(folder)
    assert status == 2 and "of the run, metrics.json says a and resolved.yaml says b" in printed and hub.repos == {}
    (folder / "resolved.yaml").write_text("# run_id: a\n" + settings)
    assert run_publish(folder)[0] == 0


def test_heads_of_another_backbone_are_refused(hub, run_publish, tmp_path):
    folder = save_run_folder(tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors", {"format": "pt"})
    status, printed = run_publish(folder)
    assert status == 2 and "ade20k, nyu, teacher" in printed and "another backbone" in printed and hub.repos == {}


def test_links_and_what_is_no_png_in_figures_are_refused(hub, run_publish, tmp_path):
    folder = save_run_folder(tmp_path / "run", heads=False, probes={})
    (tmp_path / "secret.png").write_bytes((folder / "figures" / "losses.png").read_bytes())
    (folder / "figures" / "linked.png").symlink_to(tmp_path / "secret.png")
    status, printed = run_publish(folder)
    assert status == 2 and "linked.png is a link" in printed
    (folder / "figures" / "linked.png").unlink()
    (folder / "figures" / "page.png").write_text("<html><script>alert(1)</script></html>")
    status, printed = run_publish(folder)
    assert status == 2 and "page.png is not a PNG image" in printed and hub.repos == {}


def test_what_looks_like_a_token_in_a_servers_answer_is_not_printed():
    secrets = ["hf_" + "Ab1" * 10, "ghp_" + "x1Y2" * 9, "AKIA1234567890ABCDEF1234567890ABCDEF"]
    for secret in secrets:
        said = blot_tokens(f"invalid token {secret} for user")
        assert secret not in said and said.endswith(" for user")
    assert "password=(token)" in blot_tokens("password=hunter2hunter2")
    harmless = "the repository alice/tiny is full: 3 of 3 files"
    assert blot_tokens(harmless) == harmless


def test_a_card_that_the_hub_refuses_is_not_uploaded(hub, shared_run, run_publish):
    for arguments in (("--dry-run",), ()):
        status, printed = run_publish(shared_run, *arguments, "--license", "no-such-licence")
        assert status == 2 and "license" in printed
        assert hub.repos == {}


def test_an_unreachable_hub_is_one_line(hub, shared_run, run_publish, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, printed = run_publish(shared_run)
    assert status == 2 and "no answer from the Hub" in printed


def test_a_dry_run_needs_neither_token_nor_network_and_leaves_the_card_to_read(hub, run_publish, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    folder = save_run_folder(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["publish.py", str(folder), "--repo-id", REPO, "--dry-run"])  # no licence either
    publish.main()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "license:" not in card and "Of the weights not known here" in card
    status, printed = run_publish(folder, "--dry-run")  # what both have printed
    left = [line for line in printed.splitlines() if line.strip().startswith("left")]
    assert status == 0 and ["licence of the teacher" in line for line in left] == [True, False, False]
    assert all("no answer from the Hub" in line for line in left[1:])
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    # what is wrong here is still an error
    (folder / "metrics.json").write_text("[]")
    assert run_publish(folder, "--dry-run")[0] == 2


def test_nothing_private_goes_up(hub, run_publish, tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "marvin")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu17.cluster.example")
    monkeypatch.setattr(Path, "home", lambda: Path("/data/people/marvin"))
    numbers = metrics()
    numbers["unreadable_images"] = {"/data/people/marvin/faces/anna.jpg": "truncated"}
    numbers["device"] = "NVIDIA H100 of gpu17"
    numbers["hostname"] = "gpu17.cluster.example"
    command = "training/probe.py --model=/data/people/marvin/secret/tiny --output_dir '/scratch/x/marvin runs' --seed 0"
    numbers["probes"]["ade20k"]["command"] = command
    numbers["probes"]["ade20k"]["dataset"] = "/data/people/marvin/ade"
    settings = {"dataset": "/data/people/marvin/photos of anna", "output_dir": "../marvin/tiny"}
    folder = save_run_folder(tmp_path / "private", settings=settings, **numbers)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/data/people/marvin/tiny"}))
    (folder / "modeling_raptor.py").write_text("# by marvin, on gpu17")
    assert run_publish(folder)[0] == 0
    for path, data in hub.files(REPO).items():
        for word in (b"marvin", b"gpu17", b"/data/", b"anna.jpg", TOKEN.encode()):
            assert word not in data.lower(), (path, word)
    resolved = yaml.safe_load(hub.files(REPO)["resolved.yaml"])
    assert resolved["dataset"] == "photos of anna" and resolved["teacher"] == "facebook/dinov2-small"
    assert json.loads(hub.files(REPO)["metrics.json"])["unreadable_images"] == 1
    front = yaml.safe_load(hub.files(REPO)["README.md"].split(b"---")[1])
    assert front["datasets"] == ["sayakpaul/nyu_depth_v2"]


@pytest.mark.parametrize("label", ["marvin's cat", "/home/someone/cat", TOKEN, "at GPU17"])
def test_private_data_that_stays_is_refused_by_the_name_of_its_file(label, run_publish, tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "marvin")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu17")
    folder = save_run_folder(tmp_path / "run", heads=False, probes={})
    config = json.loads((folder / "config.json").read_text())
    labels = config["id2label"] | {"0": label}
    (folder / "config.json").write_text(json.dumps(config | {"id2label": labels}))
    status, printed = run_publish(folder, "--dry-run")
    assert status == 2 and "config.json holds" in printed
    assert label not in printed


def test_user_and_host_called_like_public_words_do_not_hinder(hub, shared_run, run_publish, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")  # as on the Hub
    monkeypatch.setattr(socket, "gethostname", lambda: "raptor")
    assert run_publish(shared_run)[0] == 0
    assert b'"model_type": "raptor"' in hub.files(REPO)["config.json"]


def test_unfinished_runs_are_refused(shared_run, run_publish, tmp_path):
    folder = save_run_folder(tmp_path / "run", heads=False)
    for name in ("preprocessor_config.json", "resolved.yaml", "metrics.json", "model.safetensors", "config.json"):
        (folder / name).unlink()
        status, printed = run_publish(folder, "--dry-run")
        assert status == 2 and name in printed
    assert list_heads(shared_run) == sorted(VARIANTS)
