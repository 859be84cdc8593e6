"""Fills the card of a student from what its run has written: metrics.json, resolved.yaml and the configuration.

    card = make_card(metrics, settings, config, name="org/raptor", ...)
    card.save("README.md")

Nothing in a card is written by hand. A number that a run has not measured is left out, and the card says that it is
missing.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_raptor import RaptorConfig
from ..modeling_raptor import (
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
    RaptorPreTrainedModel,
)
from ..patch_metrics import NUM_NEIGHBOURS
from ..recipes.run_metrics import Both, Fidelity, PatchFidelity, ProbeRecord, StudentMetrics
from .card_words import (
    as_text,
    check_front_matter,
    dataset_label,
    dataset_words,
    describe_size,
    describe_tokens,
    describe_training,
    percent,
    short_count,
)

TEMPLATE = Path(__file__).with_suffix(".md")
# student and teacher cost the same if their multiply-accumulates differ by no more
ISO_COST = 0.02
TAGS = ("raptor", "block-recurrent")
# what the Hub calls the tasks of the heads
PIPELINE_TAGS: dict[type[RaptorPreTrainedModel], str] = {
    RaptorModel: "image-feature-extraction",
    RaptorForImageClassification: "image-classification",
    RaptorForSemanticSegmentation: "image-segmentation",
    RaptorForDepthEstimation: "depth-estimation",
}
_PROBE_TASKS = {
    "image-classification": "image-classification",
    "semantic-segmentation": "image-segmentation",
    "depth-estimation": "depth-estimation",
}
_CONDITIONINGS = {
    "none": "none: a block does the same at each of its steps",
    "scale": "scale: an MLP of the layer index scales attention, FFN and output",
    "embedding": "embedding: a learned vector per layer index is added to the block's input",
    "low_rank": "low_rank: per step, a low-rank term on two projections and an affine change of norms and LayerScales",
}
_FIGURES = {
    "phases": "How unlike the teacher's layers are (1 - cos of {tokens}), and the phases found.",
    "depths": "What the student reaches at each number of steps, against what they cost.",
    "fidelity": "How near the student stays to the teacher, layer by layer.",
    "losses": "Losses and learning rate of the distillation.",
}


def make_card(
    metrics: StudentMetrics,
    settings: Mapping[str, Any],
    config: RaptorConfig,
    *,
    name: str,
    classes: Mapping[str | None, type[RaptorPreTrainedModel]],
    figures: Sequence[str],
    license: str | None,
    base_model: str | None,
    datasets: Sequence[str],
    license_name: str | None = None,
    license_link: str | None = None,
    teacher_link: str | None = None,
    license_is_teachers: bool = False,
    revision: str | None = None,
    teacher_metrics: StudentMetrics | None = None,
    has_code: bool = True,
) -> ModelCard:
    """Fills the card of a distilled student.

    Args:
        metrics: the run's metrics.json.
        settings: the run's resolved.yaml.
        config: of the model.
        name: what from_pretrained is given, the repository or a folder.
        classes: of the models by variant, as `raptor_hf.hub.publication.check_weights` returns them.
        figures: paths of the figures in the repository.
        license: identifier of the weights' licence, as the Hub knows it; None where it is not known.
        base_model: the teacher's name on the Hub, None if it is not there.
        datasets: names on the Hub of the data sets that student and heads were trained on.
        license_name: what the licence is called, if `license` is "other".
        license_link: where its text is.
        teacher_link: the teacher's card, relative to this one, if it is not on the Hub.
        license_is_teachers: whether the licence was read from the teacher's card.
        revision: branch that is not the default one.
        teacher_metrics: metrics.json of a folder with the teacher's probes, under the same names of variants.
        has_code: whether the model's code lies beside the weights.

    Raises:
        ValueError: the front matter does not come back from the card as it went in.
    """
    # of numbers and settings the text, so that no name is more than a name
    metrics = StudentMetrics.from_dict(as_text(metrics.to_dict()))
    settings = as_text(settings)
    if teacher_metrics is not None:
        teacher_metrics = StudentMetrics.from_dict(as_text(teacher_metrics.to_dict()))
    probes = [_probe(variant, probe, teacher_metrics) for variant, probe in metrics.probes.items()]
    own = _own_head(metrics, settings, classes)
    data = ModelCardData(
        license=license,
        license_name=license_name,
        license_link=license_link,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[_default_class(config, classes)],
        base_model=base_model,
        datasets=list(datasets) or None,
        metrics=list(dict.fromkeys(row["metric"] for row in ([own] if own else []) + probes)) or None,
        tags=[*TAGS, *dict.fromkeys(PIPELINE_TAGS[kind] for kind in classes.values())],
        model_name=name.rpartition("/")[2],
        eval_results=_eval_results(metrics, settings, own, probes) or None,
    )
    if data.eval_results is None:
        data.pop("model_name")
    options = {"revision": revision} if revision else {}
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_id=name,
        short_name=name.rpartition("/")[2],
        run=settings,
        data_name=dataset_words(settings.get("dataset")),
        is_path=dataset_label(settings.get("dataset")) != settings.get("dataset"),
        config=config,
        teacher=metrics.teacher or {},
        facts=_facts(metrics, config),
        cost=_cost_line(metrics.macs),
        fidelity=_fidelity_rows(metrics.fidelity, config.num_hidden_layers),
        sizes=_fidelity_sizes(metrics, settings, config),
        steps=_fidelity_steps(metrics.fidelity),
        own=own,
        probes=probes,
        checks=_quick_checks(metrics.quick_checks, teacher_metrics.quick_checks if teacher_metrics else {}),
        training=describe_training(metrics, settings),
        figures=[(path, *_describe_figure(path, config)) for path in figures],
        loads=[(variant, _auto_class(kind), _is_default(config, variant)) for variant, kind in classes.items()],
        arguments="".join(f', {key}="{value}"' for key, value in options.items()),
        has_code=has_code,
        base_model_known=base_model is not None,
        teacher_link=teacher_link,
        license_is_teachers=license_is_teachers,
        license_words=as_text(license_name or license),
        missing=_missing(metrics, settings, probes, figures, base_model, teacher_link),
    )
    check_front_matter(card, data)
    return card


def _width_of_heads(config: RaptorConfig) -> str:
    """Said where heads have a width of their own."""
    return "" if config.head_dim is None else f" of {config.head_dim} each"


def _facts(metrics: StudentMetrics, config: RaptorConfig) -> list[tuple[str, str]]:
    """The table of what a student is."""
    blocks = " + ".join(map(str, config.block_repeats))
    partition = f"{config.num_blocks} blocks for {config.num_hidden_layers} layers, {blocks} steps"
    facts = [
        ("blocks", partition),
        ("phases", ", ".join(_layers(layers) for layers in config.block_layers)),
        ("width, heads", f"{config.hidden_size}, {config.num_attention_heads}" + _width_of_heads(config)),
        ("FFN", f"{config.ffn_type}, {config.intermediate_size} wide"),
        (
            "depth conditioning",
            _CONDITIONINGS[config.depth_conditioning]
            + (", and gains of heads and neurons" if config.unit_gains else ""),
        ),
        ("tokens", describe_tokens(config.has_cls, config.num_register_tokens, config.patch_size)),
        ("image size", f"{describe_size(config.image_size)} px; others that are multiples of the patch work too"),
    ]
    for label, both in (
        ("parameters, without heads", metrics.parameters),
        ("multiply-accumulates per image", metrics.macs),
    ):
        if both.student:
            share = f", {percent(both.share)} of the teacher's {short_count(both.teacher)}" if both.share else ""
            facts.append((label, short_count(both.student) + share))
    return facts


def _cost_line(macs: Both) -> str | None:
    """Whether student and teacher cost the same to run."""
    ratio = macs.share
    if ratio is None:
        return None
    if abs(ratio - 1) <= ISO_COST:
        return f"**Iso-cost**: it needs {ratio:.3f} times the teacher's multiply-accumulates."
    more = "more" if ratio > 1 else "less"
    return f"**Not iso-cost**: it needs {ratio:.3f} times the teacher's multiply-accumulates, {more} than the teacher."


def _fidelity_rows(fidelity: Fidelity | None, num_layers: int) -> dict[str, Any] | None:
    """Table of the fidelity per layer."""
    if fidelity is None or not fidelity.r2:
        return None
    columns = {"R²": fidelity.r2, "ε": fidelity.epsilon, "ε / norm": fidelity.relative_epsilon}
    columns |= {f"cos, {group}": values for group, values in fidelity.cosine.items()}
    columns = {name: values for name, values in columns.items() if values}
    if wrong := [name for name, values in columns.items() if len(values) != num_layers]:
        raise ValueError(
            f"metrics.json has {len(columns[wrong[0]])} numbers for {wrong[0]!r}, and the model {num_layers} layers; "
            "they are of different runs"
        )
    rows = zip(*columns.values(), strict=True)
    return {
        "header": list(columns),
        "rows": [[_number(value) for value in row] for row in rows],
        "mean_r2": _number(_mean_of_known(fidelity.r2)),
        "agreement": percent(fidelity.agreement),
        "patches": _patch_words(fidelity.patches),
    }


def _patch_words(patches: PatchFidelity | None) -> str | None:
    """What is known of the patches after the final norm, in a sentence or two."""
    if patches is None or patches.cosine is None:
        return None
    words = f"After the final LayerNorm, patches have a cosine of **{patches.cosine:.3f}** to the teacher's"
    if patches.neighbours is not None:
        words += f", and share **{percent(patches.neighbours)}** of their {NUM_NEIGHBOURS} nearest in other images"
    if patches.student_stability is not None and patches.teacher_stability is not None:
        words += f". Where the picture is shifted by a patch, they keep a cosine of {patches.student_stability:.3f} to "
        words += f"what they were (the teacher's: {patches.teacher_stability:.3f})"
    return words + "."


def _fidelity_sizes(
    metrics: StudentMetrics, settings: Mapping[str, Any], config: RaptorConfig
) -> list[tuple[str, str, str, str]]:
    """Size, R² of the last layer, its mean and the agreement, where there are several sizes; the run's own is first."""
    if not metrics.fidelity_by_size:
        return []
    own = [("of the run", metrics.fidelity)] if metrics.fidelity else []
    return [
        (
            (f"{size} px" if size[:1].isdigit() else size)
            + (f", {fidelity.num_images:,} images" if fidelity.num_images else ""),
            _number(fidelity.r2[-1] if fidelity.r2 else None),
            _number(_mean_of_known(fidelity.r2)),
            percent(fidelity.agreement) or "-",
        )
        for size, fidelity in [*own, *metrics.fidelity_by_size.items()]
    ]


def _fidelity_steps(fidelity: Fidelity | None) -> list[tuple[str, ...]]:
    """Steps, those of every block, their cost and what they reach, of an elastic student."""
    return [
        (
            num_steps,
            " + ".join(map(str, row.block_repeats)),
            short_count(row.macs) if row.macs else "-",
            _number(row.r2),
            percent(row.agreement) or "-",
            percent(row.student_accuracy) or "-",
        )
        for num_steps, row in (fidelity.by_steps if fidelity else {}).items()
    ]


def _own_head(
    metrics: StudentMetrics, settings: Mapping[str, Any], classes: Mapping[str | None, type]
) -> dict[str, Any] | None:
    """Accuracy of the student with the teacher's classifier, untouched."""
    fidelity = metrics.fidelity
    if fidelity is None or fidelity.student_accuracy is None:
        return None
    return {
        "variant": None if classes[None] is RaptorForImageClassification else "teacher",
        "metric": "accuracy",
        "value": fidelity.student_accuracy,
        "student": percent(fidelity.student_accuracy),
        "teacher": percent(fidelity.teacher_accuracy),
        "dataset": dataset_label(settings.get("dataset")),
        "split": settings.get("test_split"),
    }


def _probe(variant: str, probe: ProbeRecord, teacher_metrics: StudentMetrics | None) -> dict[str, Any]:
    """A row of the table of probes, with the teacher's numbers where they are of the same probe."""
    metric = probe.metric
    teacher = teacher_metrics.probes.get(variant) if teacher_metrics else None
    same = teacher is not None and all(
        getattr(teacher, key) == getattr(probe, key) for key in ("task", "dataset", "dataset_config", "split", "metric")
    )
    values = probe.last[metric]
    best = (probe.best or {}).get(metric)
    return {
        **probe.to_dict(),
        "dataset": dataset_label(probe.dataset),
        "variant": variant,
        "value": _mean(values),
        "num_seeds": len(values),
        "student": _spread(values, metric),
        "best": _spread(best, metric) if best else None,
        "teacher": _spread(teacher.last[metric], metric) if same else None,
    }


def _eval_results(
    metrics: StudentMetrics,
    settings: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    probes: Sequence[Mapping[str, Any]],
) -> list[EvalResult]:
    """What becomes the front matter's model-index; values as fractions, depth errors in metres."""
    results = []
    distilled = {
        "dataset_type": dataset_label(settings.get("dataset")),
        "dataset_name": dataset_label(settings.get("dataset")),
        "dataset_config": settings.get("dataset_config"),
        "dataset_split": settings.get("test_split"),
        "dataset_revision": settings.get("dataset_revision"),
    }
    r2 = metrics.fidelity.r2 if metrics.fidelity else []
    if r2 and r2[-1] is not None:
        results.append(
            EvalResult(
                task_type="image-feature-extraction",
                metric_type="r_squared",
                metric_name="R2 of the teacher's last layer",
                metric_value=round(r2[-1], 6),
                **distilled,
            )
        )
    if own:
        results.append(
            EvalResult(
                task_type="image-classification",
                metric_type="accuracy",
                metric_name="accuracy with the teacher's classifier",
                metric_value=round(own["value"], 6),
                **distilled,
            )
        )
    for probe in probes:
        if probe["value"] is None:
            continue
        seeds = f"mean of {probe['num_seeds']} seeds" if probe["num_seeds"] > 1 else "one seed"
        results.append(
            EvalResult(
                task_type=_PROBE_TASKS[probe["task"]],
                dataset_type=probe["dataset"],
                dataset_name=probe["dataset"],
                dataset_config=probe.get("dataset_config"),
                dataset_split=probe["split"],
                metric_type=probe["metric"],
                metric_name=f"{probe['metric']}, variant {probe['variant']}, {seeds}",
                metric_value=round(probe["value"], 6),
            )
        )
    return results


def _quick_checks(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the checks without training."""
    names = {"knn_accuracy": "k nearest neighbours", "logistic_regression_accuracy": "logistic regression"}
    return [
        {
            "dataset": dataset_label(dataset),
            "name": label + (f", k = {values['knn_k']}" if key == "knn_accuracy" and "knn_k" in values else ""),
            "student": percent(values[key]),
            "teacher": percent(teacher.get(dataset, {}).get(key)),
        }
        for dataset, values in student.items()
        for key, label in names.items()
        if values.get(key) is not None
    ]


def _missing(
    metrics: StudentMetrics,
    settings: Mapping[str, Any],
    probes: Sequence[Mapping[str, Any]],
    figures: Sequence[str],
    base_model: str | None,
    teacher_link: str | None,
) -> list[str]:
    """What a reader would look for and not find."""
    fidelity, missing = metrics.fidelity or Fidelity(), []
    if not fidelity.r2:
        missing.append("the fidelity to the teacher")
    if fidelity.agreement is None:
        missing.append("how often student and teacher agree: the teacher has no classifier")
    if fidelity.student_accuracy is None:
        missing.append("accuracy with the teacher's classifier: it has none, or other classes than the images")
    for both, name in ((metrics.parameters, "parameters"), (metrics.macs, "multiply-accumulates")):
        if both.share is None:
            missing.append(f"{name} of both models")
    if not metrics.seconds or not metrics.device:
        missing.append("the cost of the training")
    if not probes:
        missing.append("probes: no head was trained on this student")
    if alone := [probe["variant"] for probe in probes if probe["teacher"] is None]:
        missing.append(f"the teacher's number beside the probes {', '.join(alone)}")
    if single := [probe["variant"] for probe in probes if probe["num_seeds"] < 2]:
        missing.append(f"error bars of the probes {', '.join(single)}: one seed each")
    if not any(Path(figure).stem == "phases" for figure in figures):
        missing.append("the figure of the phases")
    if base_model is None and teacher_link is None:
        missing.append("a link to the teacher: it is not on the Hub, or its name there is not known")
    elif base_model is not None and not (metrics.teacher and metrics.teacher.revision):
        missing.append("the teacher's revision")
    seed = metrics.seed if metrics.seed is not None else settings.get("seed")
    whose = "whose seed is not recorded" if seed is None else f"with seed {seed}"
    missing.append(f"error bars of the distillation: this is one run, {whose}")
    return missing


def _is_default(config: RaptorConfig, variant: str | None) -> bool:
    """Whether a head is the one that its class loads without being told a variant."""
    heads = getattr(config, "head_variants", None) or {}
    return any(names[:1] == [variant] for names in heads.values())


def _default_class(
    config: RaptorConfig, classes: Mapping[str | None, type[RaptorPreTrainedModel]]
) -> type[RaptorPreTrainedModel]:
    """The class of the first head: pipelines load it without being told a variant."""
    heads = getattr(config, "head_variants", None) or {}
    defaults = [classes[names[0]] for names in heads.values() if names and names[0] in classes]
    named = [kind for kind in defaults if kind.__name__ in (config.architectures or ())]
    return (named or defaults or [classes[None]])[0]


def _auto_class(kind: type[RaptorPreTrainedModel]) -> str:
    """The Auto class that finds a class of ours."""
    return "AutoModel" + kind.__name__.removeprefix("Raptor").removeprefix("Model")


def _describe_figure(path: str, config: RaptorConfig) -> tuple[str, str]:
    """Alternative text and caption."""
    stem = Path(path).stem
    if stem in _FIGURES:
        tokens = "class token and mean patch" if config.has_cls else "the mean patch"
        return stem, _FIGURES[stem].format(tokens=tokens)
    if stem.startswith("probe-"):
        variant = stem.removeprefix("probe-")
        return f"predictions of {variant}", f"Predictions of the head `{variant}` on test images."
    return stem.replace("-", " "), ""


def _layers(layers: Sequence[int]) -> str:
    """Layers of a block, as a range where they follow each other."""
    contiguous = list(layers) == list(range(layers[0], layers[-1] + 1))
    inside = f"{layers[0]}-{layers[-1]}" if contiguous and len(layers) > 1 else ", ".join(map(str, layers))
    return f"[{inside}]"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) and known else None


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _spread(values: Sequence[float | None], metric: str) -> str | None:
    """Mean and, of several seeds, the standard deviation; errors in metres as they are, shares in percent."""
    mean = _mean(values)
    if mean is None:
        return None
    factor, digits, unit = (1, 3, " m") if metric == "rmse" else (100, 1, " %")
    deviation = f" ± {statistics.stdev(values) * factor:.{digits}f}" if len(values) > 1 else ""
    return f"{mean * factor:.{digits}f}{deviation}{unit}"


def _number(value: float | None) -> str:
    """Four significant digits; a dash for what is not defined."""
    return "-" if value is None or not math.isfinite(value) else f"{value:#.4g}"
