"""The card says what the run measured, and what it did not."""

import copy
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from raptor_hf import RaptorForDepthEstimation, RaptorForImageClassification, RaptorForSemanticSegmentation, RaptorModel
from raptor_hf.hub.student_card import make_card
from raptor_hf.recipes.run_metrics import StudentMetrics
from tests.support.hub_server import front_matter_problem
from tests.support.published_run import SETTINGS, metrics, probe
from tests.support.tiny_raptors import tiny_config

CLASSES = {
    None: RaptorModel,
    "ade20k": RaptorForSemanticSegmentation,
    "nyu": RaptorForDepthEstimation,
    "teacher": RaptorForImageClassification,
}


def card(numbers=None, settings=None, config=None, **options) -> ModelCard:
    if teacher := options.get("teacher_metrics"):
        options["teacher_metrics"] = StudentMetrics.from_dict(teacher)
    return make_card(
        StudentMetrics.from_dict(metrics() if numbers is None else numbers),
        SETTINGS | (settings or {}),
        config or tiny_config(depth_conditioning="low_rank"),
        **dict(
            name="alice/tiny",
            classes=CLASSES,
            figures=["figures/fidelity.png", "figures/phases.png", "figures/probe-ade20k.png"],
            license="apache-2.0",
            base_model="facebook/dinov2-small",
            datasets=["uoft-cs/cifar10", "scene/parse"],
        )
        | options,
    )


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def row(text: str, begin: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {begin}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("unit_gains", [False, True])
def test_card_says_when_steps_weigh_units(unit_gains):
    text = str(card(config=tiny_config(depth_conditioning="low_rank", unit_gains=unit_gains)))
    assert row(text, "depth conditioning")[1].endswith("gains of heads and neurons") == unit_gains


def test_front_matter_is_what_the_hub_asks_for():
    text = str(card())
    assert front_matter_problem(text) is None
    front = yaml.safe_load(text.split("---")[1])
    results = front.pop("model-index")[0]["results"]
    assert front == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "base_model": "facebook/dinov2-small",
        "datasets": ["uoft-cs/cifar10", "scene/parse"],
        "metrics": ["accuracy", "mean_iou", "rmse"],
        "tags": [
            *("raptor", "block-recurrent", "image-feature-extraction", "image-segmentation"),
            *("depth-estimation", "image-classification"),
        ],
    }
    values = {(r["task"]["type"], r["dataset"]["type"], m["type"]): m["value"] for r in results for m in r["metrics"]}
    assert values == {
        ("image-feature-extraction", "uoft-cs/cifar10", "r_squared"): 0.95,
        ("image-classification", "uoft-cs/cifar10", "accuracy"): 0.85,
        ("image-segmentation", "scene/parse", "mean_iou"): pytest.approx(0.41),
        ("depth-estimation", "sayakpaul/nyu_depth_v2", "rmse"): 0.6,
    }


def test_only_a_head_beside_the_backbone_is_offered_as_a_pipeline():
    classes = {None: RaptorForImageClassification}
    assert card(classes=classes).data.pipeline_tag == "image-classification"
    assert card().data.pipeline_tag == "image-feature-extraction"


def test_the_numbers_of_the_run_stand_in_the_text():
    text = str(card())
    assert "of 6 layers rewritten as 3 recurrent" in text
    assert row(text, "blocks")[1] == "3 blocks for 6 layers, 3 + 1 + 2 steps"
    assert row(text, "phases")[1] == "[1-3], [4], [5-6]"
    assert row(text, "parameters")[1] == "7 M, 31.8 % of the teacher's 22 M"
    assert "**Not iso-cost**: it needs 1.320 times the teacher's multiply-accumulates, more" in text
    fidelity = section(text, "Fidelity")
    assert row(fidelity, "layer") == ["layer", "R²", "ε", "ε / norm", "cos, cls", "cos, patches"]
    assert row(fidelity, "6 |") == ["6", "0.9500", "6.000", "0.1000", "0.9000", "0.8000"]
    assert "**0.7417**" in fidelity and "**87.5 %**" in fidelity
    assert re.findall(r"!\[.+?\]\((.+?)\)", text) == [
        *("figures/fidelity.png", "figures/phases.png", "figures/probe-ade20k.png")
    ]
    results = section(text, "Results")
    assert row(results, "the teacher's")[:5] == [
        *("the teacher's, variant `teacher`", "uoft-cs/cifar10, test", "accuracy", "85.0 %", "90.0 %")
    ]
    # the standard deviation of .40 and .42
    assert row(results, "`ade20k`")[3] == "41.0 ± 1.4 %"
    assert row(results, "`nyu`")[3] == "0.600 m"
    assert "the head here is that of seed 0" in results and "--model runs/tiny" in results
    assert row(results, "uoft-cs/cifar10 |") == ["uoft-cs/cifar10", "k nearest neighbours, k = 20", "77.0 %", "missing"]
    training = section(text, "Training")
    assert "took 3 min (phases 2 s, stage 1 60 s, stage 2 90 s) on NVIDIA H100, 1,234 images per second" in training
    assert "240 in all" in training
    assert text.count("{{") == text.count("{%") == text.count("None") == 0


def test_sizes_crops_and_averages_of_the_training_are_said_where_there_are_any():
    options = {"image_sizes": [112, 224], "final_image_size": 448, "final_share": 0.2, "augment": True}
    text = str(card(settings=options | {"ema_decay": 0.999}))
    training = " ".join(section(text, "Training").split())
    assert "images, at other sizes for as many tokens. The images are random crops of at least a quarter" in training
    assert "one of the sizes 112, 224 px. In the last 20.0 % of the last stage they have 448 px." in training
    assert "a running average with decay 0.999." in training and " in all" not in training
    assert "an image size other than those of the training is possible" in text
    plain = str(card())
    assert "crops" not in section(plain, "Training") and "average" not in section(plain, "Training")
    assert "or another image size is possible" in plain


def test_iso_cost_is_said_where_it_holds():
    for student, words in ((1_010_000, "**Iso-cost**"), (980_100, "**Iso-cost**"), (900_000, "0.900 times")):
        assert words in str(card(metrics() | {"macs": {"teacher": 1_000_000, "student": student}}))


def test_the_teachers_probes_stand_beside_the_students_where_they_are_the_same():
    teacher = {
        "probes": {
            "ade20k": probe("mean_iou", "semantic-segmentation", [0.5, 0.52, 0.54]),
            "nyu": probe("rmse", "depth-estimation", [0.5], dataset="another/data"),
        },
        "quick_checks": {"uoft-cs/cifar10": {"knn_accuracy": 0.8}},
    }
    text = str(card(teacher_metrics=teacher))
    results = section(text, "Results")
    assert row(results, "`ade20k`")[4] == "52.0 ± 2.0 %"
    assert row(results, "`nyu`")[4] == "missing"
    assert row(results, "uoft-cs/cifar10 |")[3] == "80.0 %"
    assert "- the teacher's number beside the probes nyu\n" in section(text, "Limits")


def test_what_was_not_measured_is_left_out_and_said_to_be_missing():
    text = str(card({}, base_model=None, datasets=[], figures=[], classes={None: RaptorModel}))
    assert front_matter_problem(text) is None
    front = yaml.safe_load(text.split("---")[1])
    assert not {"model-index", "base_model", "datasets", "metrics"} & front.keys()
    limits = section(text, "Limits")
    for missing in (
        *("fidelity to the teacher", "student and teacher agree", "accuracy with the teacher's classifier"),
        *("parameters of both", "multiply-accumulates of both", "cost of the training", "no head was trained"),
        *("figure of the phases", "a link to the teacher", "error bars"),
    ):
        assert missing in limits, missing
    assert "Not measured." in section(text, "Fidelity") and "No head" in section(text, "Results")
    assert "took" not in section(text, "Training")
    assert text.count("None") == text.count("nan") == text.count("![") == 0
    complete = copy.deepcopy(metrics())
    complete["probes"] = {"ade20k": probe("mean_iou", "semantic-segmentation", [0.4, 0.5])}
    limits = section(str(card(complete, teacher_metrics=complete)), "Limits")
    assert limits.split("Missing here:")[1].strip().splitlines() == [
        "- error bars of the distillation: this is one run, with seed 3"
    ]


@pytest.mark.parametrize(
    "name, label",
    [
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("digits", "digits"),
        ("data/cifar10-{split}.parquet", "cifar10"),
        ("photos of anna", "photos-of-anna"),
        ("data/more/photos/", "photos"),
        ("data/{split}/*.parquet", "local"),
    ],
)
def test_the_hub_takes_the_type_of_every_data_set(name, label):
    numbers = metrics()
    numbers["probes"]["nyu"]["dataset"] = name
    text = str(card(numbers, {"dataset": name}))
    assert front_matter_problem(text) is None
    results = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    assert {result["dataset"]["type"] for result in results} == {label, "scene/parse"}
    assert "{split}" not in text


def test_a_student_without_a_class_token_is_not_said_to_have_one():
    config = tiny_config(embedding_type="siglip_vision_model", num_register_tokens=0)
    text = str(card(config=config))
    assert row(text, "tokens")[1] == "patches of 4 x 4 px"
    assert "(1 - cos of the mean patch)" in text and "class token" not in text
    assert row(str(card()), "tokens")[1] == "1 class token, 2 registers, patches of 4 x 4 px"


def test_an_unusual_licence_has_its_name_and_its_text():
    link = "https://huggingface.co/meta/teacher/blob/main/LICENSE"
    text = str(card(license="other", license_name="deep-lake", license_link=link))
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "deep-lake", link)
    assert f"[deep-lake]({link}), for the weights" in section(text, "Licence")
    assert front_matter_problem(text) is None


def test_a_teacher_beside_the_student_is_linked_and_a_stage_that_was_left_out_is_told():
    text = str(card(settings={"stage1_steps": 0}, base_model=None, teacher_link="../vit/README.md", has_code=False))
    assert "[`facebook/dinov2-small`](../vit/README.md)" in text and "link to the teacher" not in text
    training = section(text, "Training")
    assert "no stage 1" in training and "0 steps" not in training.replace("20 steps", "")
    assert "training/distill.py alice/tiny/resolved.yaml" in training


def test_an_undefined_number_is_a_dash():
    numbers = metrics()
    numbers["fidelity"]["r2"][0] = None
    numbers["probes"]["nyu"]["last"]["rmse"] = [None]
    text = str(card(numbers))
    assert row(section(text, "Fidelity"), "1 |")[1] == "-"
    assert row(section(text, "Results"), "`nyu`")[3] == "missing"
    assert front_matter_problem(text) is None and "rmse" not in str(card(numbers).data.eval_results)


def test_every_variant_is_shown_with_its_auto_class_both_ways():
    use = section(str(card(revision="v2")), "Use")
    for call in (
        'AutoModel.from_pretrained("alice/tiny", revision="v2")',
        'AutoModel.from_pretrained("alice/tiny", trust_remote_code=True, revision="v2")',
        'AutoModelForSemanticSegmentation.from_pretrained("alice/tiny", variant="ade20k", revision="v2")',
        'AutoModelForDepthEstimation.from_pretrained("alice/tiny", variant="nyu", revision="v2")',
        'AutoModelForImageClassification.from_pretrained("alice/tiny", variant="teacher", revision="v2")',
    ):
        assert call in use, call
    for code in re.findall(r"```python\n(.*?)```", use, re.DOTALL):
        compile(code, "card", "exec")
    assert "trust_remote_code" not in str(card(has_code=False))


@pytest.mark.parametrize("problem", ["no front matter", "---\n- a\n---\n", "---\nlicense: mine\n---\n"])
def test_the_validator_of_these_tests_refuses_bad_cards(problem):
    assert front_matter_problem(problem)
    good = str(card())
    for broken in (
        good.replace("base_model: facebook/dinov2-small", "base_model: /home/x"),
        good.replace("      type: uoft-cs/cifar10\n", ""),
        good.replace("      type: uoft-cs/cifar10\n", "      type: cifar10-{split}.parquet\n"),
        good.replace("      type: uoft-cs/cifar10\n", "      type: photos of anna\n"),
        good.replace("license: apache-2.0\n", "license: other\nlicense_link: terms.txt\n"),
        good.replace("    - type: mean_iou\n", "    - kind: mean_iou\n"),
    ):
        assert broken != good and front_matter_problem(broken)


def test_names_labels_and_notes_are_text_and_no_markup():
    numbers = metrics()
    numbers["device"] = "<script>alert(1)</script> | {{ 7 * 7 }} {% raw %}"
    numbers["probes"]["ade20k"]["command"] = "probe.py `rm -rf` <img src=x>\n# heading"
    numbers["versions"] = {"<b>torch</b>": "2"}
    text = str(card(numbers, {"test_split": "<i>test</i>", "train_split": "a\n\n# b"}))
    assert not re.search(r"<(script|img|b|i)\b", text) and "{{" not in text and "{%" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &#124; &#123;&#123; 7 * 7 }}" in text
    assert "\n# heading" not in text and "\n# b" not in text
    assert front_matter_problem(text) is None


def test_fidelity_is_said_at_every_size_that_was_measured():
    assert "at this size of images alone" in section(str(card()), "Fidelity")
    numbers = metrics()
    numbers["fidelity_by_size"] = {"32 x 32": {"r2": [0.5] * 5 + [0.25], "agreement": 0.5}}
    numbers["fidelity_by_size"] |= {"48 x 48": {"r2": [0.5] * 6, "num_images": 1280}}
    fidelity = section(str(card(numbers)), "Fidelity")
    assert row(fidelity, "of the run") == ["of the run", "0.9500", "0.7417", "87.5 %"]
    assert row(fidelity, "32 x 32 px") == ["32 x 32 px", "0.2500", "0.4583", "50.0 %"]
    assert row(fidelity, "48 x 48 px, 1,280 images") == ["48 x 48 px, 1,280 images", "0.5000", "0.5000", "-"]
    assert "alone" not in fidelity


def test_what_is_known_of_the_patches_is_said():
    assert "cosine of **" not in section(str(card()), "Fidelity")
    numbers = metrics()
    numbers["fidelity"]["patches"] = {"cosine": 0.75, "neighbours": None}
    assert "have a cosine of **0.750** to the teacher's." in section(str(card(numbers)), "Fidelity")
    numbers["fidelity"]["patches"] |= {"neighbours": 0.5, "teacher_stability": 0.875, "student_stability": 0.625}
    text = section(str(card(numbers)), "Fidelity")
    assert "to the teacher's, and share **50.0 %** of their 5 nearest in other images. Where" in text
    assert "they keep a cosine of 0.625 to what they were (the teacher's: 0.875)." in text
    assert row(text, "6 |")[0] == "6"  # the table after it is still one


@pytest.mark.parametrize(
    ("name", "asked"), [("digits", False), ("owner/name", False), ("data/cifar10-{split}.parquet", True)]
)
def test_the_command_asks_for_images_that_are_neither_embedded_nor_on_the_hub(name, asked):
    command = section(str(card(settings=SETTINGS | {"dataset": name})), "Training").split("```")[1]
    assert command.endswith("resolved.yaml --dataset PATH\n" if asked else "resolved.yaml\n")


def test_fidelity_of_an_elastic_student_is_said_at_every_number_of_steps():
    assert "Elastic" not in str(card())
    numbers = metrics()
    numbers["fidelity"]["by_steps"] = {
        "24": {"block_repeats": [2, 1, 1], "macs": 12_500_000, "r2": 0.75, "agreement": 0.5, "student_accuracy": None}
    }
    fidelity = section(str(card(numbers)), "Fidelity")
    assert row(fidelity, "24") == ["24", "2 + 1 + 1", "12.5 M", "0.7500", "50.0 %", "-"]
    assert "it was trained for" in section(str(card()), "Use") and "than 6, another pace" in section(
        str(card()), "Limits"
    )
    elastic = str(card(numbers))
    assert "in n steps, as it learned to (below), and\n`block_repeats=`" in section(elastic, "Use")
    assert "- A number of steps that is not in the tables above, another pace" in section(elastic, "Limits")


def test_an_unknown_licence_is_said_and_not_guessed():
    text = str(card(license=None))
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert "Of the weights not known here" in section(text, "Licence") and "None" not in section(text, "Licence")
    assert "as the teacher's card says" in section(str(card(license_is_teachers=True)), "Licence")


def test_numbers_of_another_model_are_refused():
    numbers = metrics()
    numbers["fidelity"]["r2"] = [0.5] * 12
    with pytest.raises(ValueError, match="12 numbers for 'R²', and the model 6 layers"):
        card(numbers)


def test_the_task_of_the_card_is_that_of_the_default_head():
    heads = {"RaptorForSemanticSegmentation": ["ade20k"], "RaptorForDepthEstimation": ["nyu"]}
    text = str(card(config=tiny_config(head_variants=heads)))
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "image-segmentation"
    assert "| head `nyu`, also without `variant=` |" in section(text, "Use")
