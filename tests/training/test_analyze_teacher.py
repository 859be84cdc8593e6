"""The report says which students have another teacher than they are compared with."""

import json

from raptor_hf.recipes.fingerprints import fingerprint_model
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import tiny_dinov2
from training.analyze import other_teachers


def test_student_of_another_teacher_is_named_and_its_own_is_not(tmp_path):
    own, other = Teacher(tiny_dinov2()), Teacher(tiny_dinov2(seed=1))
    for name, teacher in (("own", own), ("other", other)):
        (tmp_path / name).mkdir()
        record = {"teacher": {"name": "a/teacher", "fingerprint": fingerprint_model(teacher.model)}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(record))
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "metrics.json").write_text(json.dumps({"teacher": {"name": "a/teacher"}}))
    students = {name: str(tmp_path / name) for name in ("own", "other", "older", "nowhere")}
    (sentence,) = other_teachers("teacher", own, students)
    assert sentence.startswith("other was distilled from another teacher: a/teacher")
    assert fingerprint_model(own.model) in sentence and fingerprint_model(other.model) in sentence
