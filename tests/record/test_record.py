"""A record survives the way to disk and back; anything else is refused in one sentence that names the key."""

import base64
import json
import os
import random
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.errors import QprecError
from qwen_precision.files import write_atomically
from qwen_precision.record.file import load, save, to_json
from qwen_precision.record.packing import LARGE, pack_column, pack_list
from qwen_precision.record.run import SCHEMA, Run, Site
from qwen_precision.record.upgrades import UPGRADES
from support.builders import a_pass, a_run, exclamation_run, healthy_run, recovered_run
from support.checkpoints import ROOT


def test_a_run_survives_saving_and_loading_as_text(demo_run: Run, tmp_path: Path) -> None:
    save(demo_run, tmp_path / "run.json")
    assert to_json(load(tmp_path / "run.json")) == to_json(demo_run)


def test_json_holds_words_and_no_bare_nan_or_infinity(demo_run: Run) -> None:
    text = to_json(demo_run)
    json.loads(text, parse_constant=lambda word: pytest.fail(f"bare {word}"))
    assert '"inf"' in text and '"nan"' in text


def test_a_saved_file_has_the_permissions_of_any_new_file_and_leaves_nothing_beside_it(
    demo_run: Run, tmp_path: Path
) -> None:
    save(demo_run, tmp_path / "run.json")
    (tmp_path / "plain").touch()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["plain", "run.json"]
    assert stat.S_IMODE((tmp_path / "run.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QprecError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_new_text_only_ever_arrives_by_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def refuse(source: str, target: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(QprecError, match="Permission denied"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def changed(run: Run, change: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(to_json(run))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("schema"), ["no `schema`"]),
        (lambda d: d.update(schema=99), ["schema 99", "upgrade"]),
        (lambda d: d.update(surprise=1), ["surprise"]),
        (lambda d: d.pop("passes"), ["passes"]),
        (lambda d: d["model"].update(layers="many"), ["model.layers"]),
        (lambda d: d["passes"][0].update(dtype="fp7"), ["passes.0"]),
        (lambda d: d["passes"][0]["abs_max"].pop(), ["passes.0.abs_max"]),
        (lambda d: d["passes"][0].update(prompt=99), ["passes.0"]),
        (lambda d: d["passes"][8]["events"][0].update(site=10**6), ["passes.8.events"]),
        (lambda d: d["passes"][8]["events"][0].update(row=7), ["passes.8.events"]),
        (lambda d: d.update(dtypes=["fp7"]), ["dtypes"]),
        (lambda d: d["wider"].update(fp16={"999999": "fp32"}), ["wider"]),
        (lambda d: d["wider"].update(fp16={"0": "fp7"}), ["wider"]),
        (lambda d: d.update(casts={"0": 999999}), ["casts"]),
        (lambda d: d["weight_totals"][0].update(dtype="fp7"), ["weight_totals"]),
    ],
)
def test_a_damaged_record_is_refused_with_the_key_named(
    change: Callable[[dict[str, Any]], None], words: list[str], demo_run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    path.write_text(changed(demo_run, change))
    with pytest.raises(QprecError) as caught:
        load(path)
    assert str(path) in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


TEXTS = ("table", "json", "markdown", "junit", "github")
"""Formats that are quick; all of them meet hostile records in render/test_formats.py."""

FIXTURES = ROOT / "tests" / "fixtures"


def test_there_is_a_fixture_of_every_earlier_schema() -> None:
    assert sorted(path.name for path in FIXTURES.glob("run-v*.json")) == [f"run-v{n}.json" for n in range(1, SCHEMA)]
    assert len(UPGRADES) == SCHEMA - 1


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("run-v*.json")), ids=lambda path: path.stem)
def test_an_old_record_is_still_read_and_judged(path: Path) -> None:
    from qwen_precision.judge.checks import judge

    run = load(path)
    assert run.schema_ == SCHEMA and (run.rescue is None) == (path.stem != "run-v3")
    assert run.model.files == []  # what nobody noted then, nobody knows now
    first = judge(run).findings[0]
    if run.generation is None:
        assert (first.kind, first.place.layer, first.place.name) == ("overflow", 3, "down_proj output")
    else:
        assert (first.kind, first.place.step) == ("nonfinite-logits", 0)
        assert [each.way for each in run.generation.rows[0].stretches] == ["bf16"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d.update(generation=None), "generation"),
        (lambda d: d["generation"]["rows"][0]["top1"].pop(), "generation.rows.0"),
        (lambda d: d["generation"]["rows"][0].update(row=5), "generation.rows.0"),
        (lambda d: d["generation"]["rows"][0]["stretches"][0].update(dtype="fp7"), "generation.rows.0.stretches"),
        (lambda d: d["generation"]["trips"][0].update(row=5), "generation.trips.0"),
        (lambda d: d["generation"]["trips"][0].update(kind="odd"), "generation.trips.0.kind"),
        (lambda d: d["generation"]["trips"][0].update(dtype="fp7"), "generation.trips.0"),
        (lambda d: d["generation"].update(error={"step": 0, "rows": [9], "message": ""}), "generation.error"),
        (lambda d: d.update(schema=0), "schema 0"),
    ],
)
def test_a_damaged_generation_is_refused_with_the_key_named(
    change: Callable[[dict[str, Any]], None], word: str, tmp_path: Path
) -> None:
    path = tmp_path / "gen.json"
    path.write_text(changed(exclamation_run(), change))
    with pytest.raises(QprecError, match=word.replace(".", r"\.")):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["settings"].update(dtype=["fp16"], attention={}),
        lambda d: d["generation"]["trips"][0]["before"].update(nan="nan", inf="inf"),
        lambda d: d["generation"].update(options={"do_sample": True, "temperature": [1], "top_k": "x"}),
        lambda d: d["generation"].update(guards={"clamp": 7}),
        lambda d: d["generation"]["rows"][0].update(stretches=[], clean_text=None),
    ],
)
def test_an_odd_generation_is_still_judged_and_shown(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    from qwen_precision.judge.checks import judge
    from qwen_precision.render import FORMATS, one

    (tmp_path / "gen.json").write_text(changed(exclamation_run(), change))
    report = judge(load(tmp_path / "gen.json"))
    assert report.verdict["fp16"] == "fail" and all(FORMATS[name].render(one(report)) for name in TEXTS)


def test_a_generation_damaged_at_random_never_gives_a_traceback(tmp_path: Path) -> None:
    damaged_at_random(to_json(recovered_run()), tmp_path / "gen.json")


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "7", '"x"', "{", "[" * 100000, '{"schema": "1"}', "\x00"])
def test_what_is_not_a_record_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(QprecError):
        load(path)


def test_bytes_that_are_not_text_and_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name in ("bytes", "missing", "."):
        with pytest.raises(QprecError):
            load(tmp_path / name)


def damaged_at_random(text: str, path: Path) -> None:
    from qwen_precision.judge.checks import judge
    from qwen_precision.render import FORMATS, one

    dice = random.Random(0)
    for _ in range(60):
        data = list(text)
        for _ in range(dice.choice([1, 3, 30])):
            data[dice.randrange(len(data))] = dice.choice('0"{}[],:-aE\\')
        path.write_text("".join(data))
        try:
            report = judge(load(path))
        except QprecError:
            continue
        for name in TEXTS:
            FORMATS[name].render(one(report))


def test_a_record_damaged_at_random_never_gives_a_traceback(demo_run: Run, tmp_path: Path) -> None:
    damaged_at_random(to_json(demo_run), tmp_path / "run.json")


def big_run(sites: int) -> Run:
    places = [Site(layer=n % 94, module=f"model.layers.{n % 94}.mlp", op="linear", call=n // 94) for n in range(sites)]
    column = [None if n % 7 == 0 else float(f"{1.2345678 * (n + 1):.6g}") for n in range(sites)]
    column[1], column[2] = float("inf"), float("nan")
    return a_run([a_pass("fp32", column), a_pass("fp16", column)], sites=places)


@pytest.mark.parametrize("sites", [LARGE - 1, LARGE])
def test_a_large_record_is_packed_and_comes_back_as_it_was(sites: int, tmp_path: Path) -> None:
    run = big_run(sites)
    save(run, tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    assert isinstance(data["passes"][0]["abs_max"], str) == isinstance(data["sites"], str) == (sites == LARGE)
    again = load(tmp_path / "run.json")
    assert to_json(again) == to_json(run) and again.sites == run.sites
    for ours, theirs in zip(again.passes[0].abs_max, run.passes[0].abs_max, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or str(float(f"{ours:.6g}")) == str(theirs)


def test_a_record_of_many_layers_operations_dtypes_and_prompts_stays_small() -> None:
    """94 layers of 1,000 operations, three dtypes, ten prompts is 30 such columns: a tenth of them is measured."""
    dice = random.Random(0)
    column = [float(f"{10 ** dice.uniform(-2, 4):.6g}") for _ in range(94_000)]
    packed = pack_column(column)
    assert 30 * len(packed) < 14_000_000


@pytest.mark.parametrize(
    "column",
    ["", "f32:", "f32:AAAA", "f32:!!!!", "json:AAAA", "f32:" + base64.b64encode(zlib.compress(b"abc")).decode(), "x"],
)
def test_a_damaged_packed_column_is_refused_with_its_key(column: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(changed(big_run(10), lambda data: data["passes"][0].update(abs_max=column)))
    with pytest.raises(QprecError, match=r"passes\.0\.abs_max"):
        load(path)


def test_a_packed_column_is_never_unpacked_beyond_what_a_record_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    import qwen_precision.record.packing as packing

    bomb = base64.b64encode(zlib.compress(b"\0" * 50_000_000)).decode()
    with pytest.raises(ValueError, match="larger than a record may hold"):
        packing.unpack_column("f32:" + bomb, 1000)
    monkeypatch.setattr(packing, "_MOST_TEXT", 1000)
    with pytest.raises(ValueError, match="sites: is a packed list that is damaged, or larger"):
        packing.unpack_all({"sites": "json:" + bomb})
    with pytest.raises(ValueError, match="packed numbers"):
        packing.unpack_all({"sites": [0] * 400_000, "passes": [{"abs_max": "f32:"}] * 100})


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["sites"][3].update(layer=10**400),
        lambda d: d["settings"].update(deep=json.loads("[" * 300 + "]" * 300)),
    ],
)
def test_absurd_numbers_and_nesting_are_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(changed(healthy_run(), change))
    with pytest.raises(QprecError, match=r"run\.json"):
        load(tmp_path / "run.json")


def test_half_characters_are_made_whole_so_that_every_format_can_be_written(tmp_path: Path) -> None:
    from qwen_precision.judge.checks import judge
    from qwen_precision.render import FORMATS, one

    (tmp_path / "run.json").write_text(changed(healthy_run(), lambda d: d["model"].update(source="a\ud800b")))
    run = load(tmp_path / "run.json")
    assert "?" in run.model.source
    for each in FORMATS.values():
        out = each.render(one(judge(run)))
        assert isinstance(out, bytes) or out.encode("utf-8")


def test_a_file_without_an_end_is_not_read_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import qwen_precision.record.file as record

    monkeypatch.setattr(record, "MAX_BYTES", 1000)
    (tmp_path / "run.json").write_bytes(b"x" * 1001)
    with pytest.raises(QprecError, match="is larger than 0 MiB"):
        load(tmp_path / "run.json")
    with pytest.raises(QprecError, match="is no regular file"):
        load(Path("/dev/zero"))


def _bomb(kind: str) -> str:
    """A small record that stands for far more than a record holds, or makes an error of everything in it."""
    data = json.loads(to_json(healthy_run()))
    if kind == "column of gigabytes":
        data["sites"] = pack_list([None] * 200_000)
        data["passes"] = [{**data["passes"][0], "abs_max": pack_column([0.0] * 200_000)}] * 100
    elif kind == "packed sites":
        data["sites"] = pack_list([None] * 3_000_000)
    elif kind == "packed text":
        data["sites"] = "json:" + base64.b64encode(zlib.compress(b"[" * 10**9)).decode()
    elif kind == "wrong column":
        data["passes"][0]["abs_max"] = ["x"] * 1_500_000
    elif kind == "wrong rows":
        data["prompts"] = [1] * 1_500_000
    elif kind == "wrong table":
        data["environment"] = {str(number): number for number in range(240_000)}
    elif kind == "too wide":
        data |= {str(number): 0 for number in range(300_000)}
    else:
        data["choices"] = [[]] * 5_000_000
    return json.dumps(data)


BOMBS = ["column of gigabytes", "packed sites", "packed text", "wrong column", "wrong rows", "wrong table", "too wide"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("kind", [*BOMBS, "many values"])
def test_no_record_takes_more_memory_than_a_gigabyte(kind: str, tmp_path: Path) -> None:
    """In a process that may have no more; and one error is made, not one of every value."""
    (tmp_path / "run.json").write_text(_bomb(kind))
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom qwen_precision.errors import QprecError\n"
        "from qwen_precision.record import load\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))\n"
        "try:\n    load(Path(sys.argv[1]))\nexcept QprecError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.json")], capture_output=True, text=True)
    assert done.returncode == 0 and "run.json: " in done.stdout, done.stderr
    assert len(done.stdout) < 500


def test_a_long_path_to_a_number_is_not_in_the_record(demo_run: Run) -> None:
    """A demo record is small: one column a pass, six digits a number."""
    assert len(to_json(demo_run)) < 160_000


@pytest.mark.parametrize("name", ["run-v1.json", "run-v2.json", "run-v3.json"])
def test_an_old_record_is_redacted_if_its_texts_were_taken_out_and_only_then(name: str, tmp_path: Path) -> None:
    assert not load(FIXTURES / name).redacted
    data = json.loads((FIXTURES / name).read_text())
    for prompt in data["prompts"]:
        for row in prompt["rows"]:
            row.update(text="[87 characters, sha256 0123456789ab]", tokens=["" for _ in row["tokens"]])
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert load(tmp_path / "run.json").redacted
