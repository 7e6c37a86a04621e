import json

import pytest

from audit_toys import toy
from unpoison.audit.reference import (
    Conditions,
    ReferenceTable,
    add_to_reference,
    family_of,
    fewest_references,
    judge,
    read_reference,
)
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import ConfigError, DataError
from unpoison.records import Geometry

HERE = Conditions(family="ResNet", image_size=32, settings={"gain": 0.99}, shadow="abc")
TABLE = (ReferenceTable(HERE, {f"clean-{i}": 0.2 + 0.01 * i for i in range(19)}),)


def test_the_rank_is_the_p_value():
    low = judge(0.05, HERE, TABLE, alpha=0.05)
    assert (low.verdict, low.p_value, low.reason) == ("poisoned", pytest.approx(1 / 20), "")
    between = judge(0.205, HERE, TABLE, alpha=0.05)
    assert (between.verdict, between.p_value) == ("no_evidence", pytest.approx(2 / 20))
    assert judge(1.0, HERE, TABLE, alpha=0.05).p_value == 1
    assert low.mask_shares == tuple(sorted(TABLE[0].mask_shares.values()))


def test_an_equal_reference_counts_against_the_suspicion():
    assert judge(0.2, HERE, TABLE, alpha=0.05).p_value == pytest.approx(2 / 20)


def test_clean_encoders_are_called_backdoored_no_more_often_than_alpha():
    """Each of 20 exchangeable encoders takes its turn as the suspect: exactly one of them may be an alarm."""
    shares = [0.1 + 0.02 * i for i in range(20)]
    alarms = 0
    for held_out, share in enumerate(shares):
        others = {str(i): s for i, s in enumerate(shares) if i != held_out}
        alarms += judge(share, HERE, (ReferenceTable(HERE, others),), alpha=0.05).verdict == "poisoned"
    assert alarms == 1


def test_without_a_reference_there_are_figures_and_no_verdict():
    said = judge(0.01, HERE, (), alpha=0.05)
    assert (said.verdict, said.p_value) == ("inconclusive", None)
    assert "is not known: no reference holds a ResNet" in said.reason


def test_several_tables_are_taken_together_and_each_encoder_counts_once():
    own = ReferenceTable(HERE, {"clean-0": 0.2, "mine": 0.9})
    said = judge(0.05, HERE, (*TABLE, own), alpha=0.05)
    assert len(said.mask_shares) == 20 and said.p_value == pytest.approx(1 / 21)


def test_the_table_that_comes_along_can_be_read():
    from unpoison.audit_pipeline import SHIPPED_REFERENCE

    assert isinstance(read_reference(SHIPPED_REFERENCE), tuple)


def test_the_encoder_itself_is_no_reference_and_too_few_are_said():
    said = judge(0.2, HERE, TABLE, alpha=0.05, fingerprint="clean-0")
    assert said.verdict == "inconclusive" and len(said.mask_shares) == 18
    assert "holds 18 other clean encoders of this family: at alpha 0.05 at least 19 are needed" in said.reason
    assert judge(0.01, HERE, TABLE, alpha=0.01).verdict == "inconclusive"
    assert fewest_references(0.2) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "ViT"}, "no reference holds a ViT"),
        ({"image_size": 64}, "no reference holds a ResNet at 64 pixels"),
        ({"shadow": "other"}, "no reference holds one of its family that was measured on the same images"),
        (
            {"settings": {"gain": 0.9}},
            "no reference holds one of its family that was measured with the same settings",
        ),
    ],
)
def test_figures_taken_under_other_conditions_are_not_compared(change, reason):
    said = judge(0.01, Conditions(**{**vars(HERE), **change}), TABLE, alpha=0.05)
    assert said.verdict == "inconclusive" and said.p_value is None and reason in said.reason


def test_a_file_grows_by_conditions_and_counts_each_encoder_once(tmp_path):
    path = tmp_path / "reference.json"
    other = Conditions(**{**vars(HERE), "image_size": 64})
    assert add_to_reference(path, HERE, "a", 0.4) == 1
    assert add_to_reference(path, HERE, "b", 0.5) == 2
    assert add_to_reference(path, HERE, "a", 0.45) == 2
    assert add_to_reference(path, other, "a", 0.7) == 1
    first, second = read_reference(path)
    assert (first.conditions, dict(first.mask_shares)) == (HERE, {"a": 0.45, "b": 0.5})
    assert (second.conditions, dict(second.mask_shares)) == (other, {"a": 0.7})
    with pytest.raises(ConfigError, match="an encoder without a fingerprint cannot be a reference"):
        add_to_reference(path, HERE, "", 0.4)


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", '{"schema": 1}', '{"schema": 1, "tables": [{"family": "x"}]}', "[" * 100_000],
    ids=["text", "list", "no tables", "half a table", "deep"],
)
def test_what_is_no_reference_file_is_refused(tmp_path, text):
    path = tmp_path / "reference.json"
    path.write_text(text)
    with pytest.raises(DataError, match="is no reference file: expected JSON as `unpoison audit` writes it"):
        read_reference(path)


def test_shares_out_of_range_other_schemas_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "reference.json"
    add_to_reference(path, HERE, "a", 0.4)
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "schema": 2}))
    with pytest.raises(DataError, match="schema 2, this version reads 1: install a matching unpoison"):
        read_reference(path)
    value["tables"][0]["mask_shares"]["a"] = 7
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"mask share 7.0, expected a share in \[0, 1\]"):
        read_reference(path)
    with pytest.raises(ConfigError, match="no such file; expected one that --add-to-reference wrote"):
        read_reference(tmp_path / "none.json")


def test_a_family_is_read_off_the_network_and_not_off_its_name():
    encoder = toy()
    encoder.name = "resnet50"
    assert family_of(encoder) == "WhiteSquare of 1 parameters"
    encoder.network = lambda images: images
    assert family_of(encoder) == "function without parameters"


def test_networks_that_look_at_full_resolution_are_a_family_of_their_own():
    """The stems of stride 1 and 2 have the same weights, and what collapses their features differs."""

    def family(stride):
        network = build_backbone(Architecture(name="resnet10", image_size=32, width=4, stem_stride=stride))
        return family_of(Encoder(network, Preprocessing(geometry=Geometry(32, 32)), device="cpu"))

    usual, fine = family(None), family(1)
    assert usual == family(2) and "at full resolution" not in usual
    assert fine == f"{usual}, at full resolution"
