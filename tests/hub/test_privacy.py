"""Paths, names and tokens are found and taken out."""

import pytest

from raptor_hf.hub.privacy import PrivateData


@pytest.mark.parametrize(
    "value, cleaned",
    [
        ("/data/ann/imagenet", "imagenet"),
        ("~/models/dino/", "dino"),
        ("../ann/teacher", "teacher"),
        ("/data/my images/of ann", "of (removed)"),
        ("C:\\Users\\ann\\teacher", "teacher"),
        ("file:///data/teacher", "teacher"),
        ("train.py --model=/data/ann/m --out '/tmp/x' --lr 1e-3", "train.py --model=m --out 'x' --lr 1e-3"),
        ("runs/ann/k3 on gpu7", "runs/(removed)/k3 on (removed)"),
        ("gpu7.lab.example", "(removed)"),
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("annotations, 3/4 of them", "annotations, 3/4 of them"),
        ("use hunter2!", "use (removed)!"),
    ],
)
def test_paths_names_and_token_are_taken_out_and_nothing_else(value, cleaned):
    private = PrivateData("/home/ann", ("ann", "gpu7.lab.example"), "hunter2")
    nested = {"a": [{"b": value, "hostname": "gpu7", "_name_or_path": "/x"}], "n": 1.5, "none": None}
    assert private.remove(nested) == {"a": [{"b": cleaned}], "n": 1.5, "none": None}
    assert private.remove({value: {"unreadable_images": {"a.jpg": "no"}}}) == {cleaned: {"unreadable_images": 1}}
    assert private.find(cleaned) is None


def test_what_is_private_is_found_without_being_repeated():
    private = PrivateData("/srv/h/ann", ("ann", "gpu7.lab.example"), "hunter2", ("org/gpu9",))
    for text, kind in (
        ("by Ann.", "name of the user"),
        ("ran on gpu7-2", "name of the user or of the host"),
        ("/srv/h/ann/x", "home directory"),
        ("at /home/bob/x", "home directory"),
        ("'hunter2'", "token"),
        ("hf_" + "a1" * 17, "token"),
    ):
        assert kind in private.find(text) and text not in private.find(text)
    assert private.find("cannon, root, /srv/h/annex") is None
    # names that everybody sees
    assert PrivateData("/root", ("root", "raptor"), None).find("root: a raptor") is None
    assert PrivateData("/x", ("gpu9", "org"), None, ("org/gpu9",)).find("org/gpu9") is None
    assert private.find("ann", has_words=False) is None and private.find("/srv/h/ann", has_words=False)
