"""ONNX Runtime gives PyTorch's answers for every length; files that do not fit are refused by name."""

import os
import shutil
import threading
import time

import numpy as np
import onnx
import pytest
import torch
from test_model import random_model, random_tokens

from hstu_lab import checks
from hstu_lab.config import RAB_KINDS, preset
from hstu_lab.model import CheckpointError, load_checkpoint, save_checkpoint
from hstu_lab.onnx_export import (
    INPUTS,
    OnnxError,
    OnnxModels,
    _is_complete,
    _publish,
    content_hash,
    export,
    export_cached,
    history_inputs,
    trace,
)
from hstu_lab.onnx_report import parity
from hstu_lab.ops.reference import time_thresholds


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


LENGTHS = [0, 1, 14, 15, 16, 30, 31, 62]
"""Events after the user token: with it 1, 2, edges of blocks of 16 and 32, and 63, the longest that leaves room for an item."""


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """(model, its checkpoint, the cache, the folder made in it, what the cache held while that was being made)."""
    checkpoint, cache = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("cache")
    model = random_model("none", num_layers=1)
    save_checkpoint(model, checkpoint)
    folders = []
    builder = threading.Thread(target=lambda: folders.append(export_cached(checkpoint, cache, progress=False)))
    builder.start()
    while builder.is_alive() and not list(cache.glob(".building-*/*/*")):
        time.sleep(0.01)
    meanwhile = os.listdir(cache)
    builder.join()
    return model, checkpoint, cache, folders[0], meanwhile


@pytest.fixture(scope="module")
def exported(tmp_path_factory, cached):
    """rab -> (model, folder), exported once; two layers where the whole bias is under test."""
    made = {"none": (cached[0], cached[3])}

    def get(rab="position+time"):
        if rab not in made:
            model = random_model(rab, num_layers=2 if rab == "position+time" else 1)
            model.known_items[[7, 500]] = False
            for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
                torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            made[rab] = model, export(model, tmp_path_factory.mktemp("onnx"), progress=False)
        return made[rab]

    return get


@pytest.fixture(scope="module")
def timed(exported):
    model, folder = exported()
    return model, OnnxModels(folder, threads=1)


def candidates_for(batch, count, seed=0):
    return torch.randint(1, 501, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rab", RAB_KINDS)
def test_every_output_equals_pytorch(exported, rab):
    model, folder = exported(rab)
    models = OnnxModels(folder, threads=1)
    batches = [LENGTHS, [0], [63], [5, 5], [40, 1, 7], [62, 0, 0, 3], [1] * 5]
    for count, lengths in enumerate(batches, start=1):
        tokens, offsets = random_tokens(model.config, lengths, seed=count)
        rows = parity(model, models, tokens, offsets, candidates_for(len(lengths), count))
        assert {row.output.split()[0] for row in rows} == set(INPUTS)
        for row in rows:
            assert row.within(1e-5), (lengths, row)
            assert row.masked == (3 if rab == "position+time" or rab == "position" else 1) * len(lengths) * (
                "logits" in row.output
            )


def test_parity_notices_a_changed_weight_and_a_changed_mask(timed):
    model, models = timed
    tokens, offsets = random_tokens(model.config, [9, 20])
    batch = tokens, offsets, candidates_for(2, 4)
    model.stack.layers[1].time_bias[0, 0] += 0.05
    changed = {row.output for row in parity(model, models, *batch) if row.max_rel > 1e-5}
    model.stack.layers[1].time_bias[0, 0] -= 0.05
    assert changed >= {"stack hidden", "stack logits", "ranker engagement"}
    assert "encoder x" not in changed
    model.known_items[3] = False
    rows = {row.output: row for row in parity(model, models, *batch)}
    model.known_items[3] = True
    assert (rows["stack logits"].masked, rows["stack logits"].agreed, rows["stack logits"].stray) == (8, 6, 0)
    assert not rows["stack logits"].within(1e-5)
    assert rows["stack logits"].max_rel < 1e-5, "the others agree"
    assert "6 of 8 masked agree" in str(rows["stack logits"])
    assert rows["stack hidden"].within(1e-5)
    model.known_items[500] = True
    row = next(row for row in parity(model, models, *batch) if row.output == "stack logits")
    model.known_items[500] = False
    assert (row.masked, row.agreed, row.stray, row.within(1e-5)) == (4, 4, 2, False)
    assert "2 infinite or NaN here only" in str(row)


def test_the_ten_best_items_are_pytorchs(timed):
    model, models = timed
    tokens, offsets = random_tokens(model.config, list(range(60)), seed=3)
    inputs = history_inputs(model, tokens, offsets)
    x = models.encode(inputs["rows"], inputs["action"], inputs["gap_bucket"])
    logits = models.stack(x, inputs["times"], inputs["lengths"])
    truth = model.logits(model.jagged(tokens, offsets)[offsets[1:] - 1])
    assert torch.equal(logits.topk(10).indices, truth.topk(10).indices)
    assert logits[:, [0, 7, 500]].isneginf().all()


def test_time_buckets_are_exact_at_every_threshold(timed):
    model, models = timed
    edges = torch.tensor(time_thresholds(model.config.num_time_buckets))
    gaps = torch.cat([edges - 1, edges, edges + 1, torch.tensor([0, 2**40])])
    times = torch.stack([torch.full_like(gaps, 1_700_000_000), 1_700_000_000 + gaps], dim=1)
    x = torch.randn(1, 2, model.config.d_model, generator=torch.Generator().manual_seed(1)).repeat(len(gaps), 1, 1)
    lengths = torch.full_like(gaps, 2)
    ours = models.run("stack", x=x, times=times, lengths=lengths)["hidden"]
    truth = model.stack.dense(x, lengths, times)[:, 1]
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)
    steps = (truth[1 : len(edges)] - truth[: len(edges) - 1]).abs().amax(dim=1)
    assert (steps > 1e-4).all(), "each bucket must show in the answer, or this test sees nothing"


def test_padding_does_not_matter(timed):
    model, models = timed
    inputs = history_inputs(model, *random_tokens(model.config, [4, 11]))
    x = models.encode(inputs["rows"], inputs["action"], inputs["gap_bucket"])
    candidates = torch.randn(2, 3, model.config.d_model)
    plain = models.run("stack", x=x, times=inputs["times"], lengths=inputs["lengths"])["hidden"]
    ranked = models.rank(x, candidates, inputs["times"], inputs["lengths"])
    outside = torch.arange(40) >= inputs["lengths"].unsqueeze(1)
    x = torch.nn.functional.pad(x, (0, 0, 0, 28)).masked_fill(outside.unsqueeze(2), 1e4)
    times = torch.nn.functional.pad(inputs["times"], (0, 28)).masked_fill(outside, -(2**50))
    torch.testing.assert_close(models.run("stack", x=x, times=times, lengths=inputs["lengths"])["hidden"], plain)
    torch.testing.assert_close(models.rank(x, candidates, times, inputs["lengths"]), ranked)


def test_candidates_see_the_history_and_themselves_only(timed):
    model, models = timed
    inputs = history_inputs(model, *random_tokens(model.config, [0, 1, 30]))
    x = models.encode(inputs["rows"], inputs["action"], inputs["gap_bucket"])
    candidates = torch.randn(3, 9, model.config.d_model, generator=torch.Generator().manual_seed(2))
    history = inputs["times"], inputs["lengths"]
    scores = models.rank(x, candidates, *history)
    order = torch.tensor([4, 0, 8, 2, 1, 7, 3, 6, 5])
    torch.testing.assert_close(models.rank(x, candidates[:, order], *history), scores[:, order])
    torch.testing.assert_close(models.rank(x, candidates[:, 5:6], *history), scores[:, 5:6])
    torch.testing.assert_close(models.rank(x[:1], candidates[:1], *(h[:1] for h in history)), scores[:1])
    x[2, 29] = torch.randn(model.config.d_model)
    changed = (models.rank(x, candidates, *history) - scores).abs().amax(dim=(1, 2))
    assert changed[2] > 1e-4, "the history must count"
    assert changed[:2].max() == 0


def test_an_empty_history_can_be_ranked(timed):
    model, models = timed
    x, candidates = torch.randn(2, 3, 32), torch.randn(2, 4, 32)
    scores = models.rank(x, candidates, torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 2]))
    alone = model.stack.jagged(candidates[0], torch.tensor([0, 4]), torch.zeros(4, dtype=torch.int64), torch.tensor([4]))
    torch.testing.assert_close(scores[0], model.task_scores(alone))


def test_numpy_in_numpy_out(timed):
    model, models = timed
    rows, index = np.ones((2, 3, model.config.d_model), np.float32), np.ones((2, 3), np.int64)
    x = models.encode(rows, index, index)
    assert isinstance(x, np.ndarray)
    assert isinstance(models.encode(torch.from_numpy(rows), index, index), torch.Tensor)
    assert models.stack(x, index, np.array([1, 3])).shape == (2, model.config.num_items)
    assert models.rank(x, x[:, :2], index, np.array([1, 3])).shape == (2, 2, 3)
    assert models.engine.startswith("ONNX Runtime 1.")
    assert models.engine.endswith(" CPU")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 3, 32))}, "stack: x is float64; give float32"),
        ({"x": np.zeros((2, 3, 31), np.float32)}, r"x has shape \(2, 3, 31\); give \(batch 2, length 3, d_model 32\)"),
        ({"times": np.zeros((2, 4), np.int64)}, r"times has shape \(2, 4\); give \(batch 2, length 3\)"),
        ({"times": torch.zeros(2, 3)}, "times is float32; give int64"),
        ({"lengths": np.array([3])}, r"lengths has shape \(1,\); give \(batch 2\)"),
        ({"lengths": np.array([3, 4])}, r"lengths lies in 3..4; give values in 1..3"),
        ({"lengths": np.array([0, 3])}, r"lengths lies in 0..3; give values in 1..3"),
        ({"times": None}, "times is object; give int64"),
        ({"offsets": np.array([0, 3])}, "inputs are x, times, lengths, offsets; give x, times, lengths"),
        ({"x": np.zeros((2, 65, 32), np.float32), "times": np.zeros((2, 65), np.int64)}, "length is 65, .* max_seq_len is 64"),
        ({"x": np.zeros((0, 3, 32), np.float32)}, "none of them 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(timed, change, message):
    fitting = {"x": np.zeros((2, 3, 32), np.float32), "times": np.zeros((2, 3), np.int64), "lengths": np.array([3, 2])}
    timed[1].run("stack", **fitting)
    with pytest.raises(OnnxError, match=message):
        timed[1].run("stack", **{**fitting, **change})


@pytest.mark.parametrize(("name", "value"), [("action", 7), ("action", -1), ("gap_bucket", 64)])
def test_ids_outside_a_table_are_refused(timed, name, value):
    ids = {"action": np.zeros((1, 2), np.int64), "gap_bucket": np.zeros((1, 2), np.int64)}
    ids[name][0, 1] = value
    with pytest.raises(OnnxError, match=f"{name} lies in"):
        timed[1].encode(np.zeros((1, 2, 32), np.float32), ids["action"], ids["gap_bucket"])


def rewrite(path, **metadata):
    """Change, or with None remove, metadata of an ONNX file."""
    proto = onnx.load(path)
    kept = {entry.key: entry.value for entry in proto.metadata_props} | metadata
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {key: value for key, value in kept.items() if value is not None})
    onnx.save(proto, path)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(b""), "not a readable ONNX model|no 'schema_version'"),
        (lambda p: p.write_bytes(b"\x80\x04garbage" * 50), "not a readable ONNX model"),
        (lambda p: cut(p, p.stat().st_size // 2), "not a readable ONNX model"),
        (lambda p: cut(p, -1), "not a readable ONNX model"),
        (lambda p: rewrite(p, schema_version="99"), "schema_version is 99, not 3"),
        (lambda p: rewrite(p, checkpoint=None), "no 'checkpoint'"),
        (lambda p: rewrite(p, checkpoint="0" * 64), "its checkpoint is not that of encoder.onnx"),
        (lambda p: rewrite(p, config="{}"), "its config is not that of encoder.onnx"),
        (lambda p: shutil.copy(p.with_name("ranker.onnx"), p), "its part is ranker, not stack"),
    ],
)
def test_damaged_files_are_refused_in_one_line(exported, tmp_path, damage, message):
    folder = shutil.copytree(exported()[1], tmp_path / "copy")
    damage(folder / "stack.onnx")
    with pytest.raises(OnnxError, match=message) as raised:
        OnnxModels(folder, threads=1)
    assert "stack.onnx" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_checkpoint_and_another_config_are_refused(exported, tmp_path):
    model, folder = exported()
    assert OnnxModels(folder, threads=1, checkpoint=content_hash(model)).config == model.config
    with pytest.raises(OnnxError, match=f"exported from checkpoint {content_hash(model)[:16]}, not from"):
        OnnxModels(folder, threads=1, checkpoint=content_hash(exported("none")[0]))
    for part in INPUTS:
        shutil.copy(folder / f"{part}.onnx", tmp_path)
        rewrite(tmp_path / f"{part}.onnx", config='{"schema_version": 99}')
    with pytest.raises(OnnxError, match=r"encoder.onnx: schema_version is 99"):
        OnnxModels(tmp_path, threads=1)


def test_a_file_in_the_folders_place_and_a_temperature_near_zero_are_refused(tmp_path):
    model = random_model("none", num_layers=1)
    (tmp_path / "file").touch()
    with pytest.raises(OnnxError, match=r"file: cannot be written to \(File exists\); give a new folder"):
        export(model, tmp_path / "file", progress=False)
    model.config = model.config.replace(temperature=1e-5)
    with pytest.raises(OnnxError, match="temperature is 1e-05: logits could reach -32768"):
        export(model, tmp_path, progress=False)


def test_a_part_whose_length_the_exporter_fixed_is_refused():
    class Averaging(torch.nn.Linear):
        def forward(self, rows, action, gap_bucket):
            return super().forward(rows) / float(rows.shape[1])

    with pytest.raises(OnnxError, match=r"encoder: the exporter of PyTorch .* fixed the length of rows"):
        trace("encoder", Averaging(32, 32), preset("tiny"))


def loop_mask_mean(x, lengths):
    keep = torch.stack([(i < lengths) & (i >= lengths - 4) for i in range(x.shape[1])], dim=1)
    return (x * keep.unsqueeze(2)).sum(dim=1) / keep.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, lengths: x[:, -4:].mean(dim=1), "in PyTorch already, lengths [3] are wrong"),
        (lambda x, lengths: lengths, "not (B, D)"),
        (loop_mask_mean, "a Python number fixed what should be dynamic"),
    ],
)
def test_the_exercise_tells_what_was_lost(answer, message, capsys):
    assert not checks.check("recent-mean", answer)
    assert message in capsys.readouterr().out


def test_the_content_hash_follows_what_the_files_hold(tmp_path):
    model = random_model("none")
    first = content_hash(model)
    assert content_hash(save_checkpoint(model, tmp_path)) == content_hash(load_checkpoint(tmp_path)) == first
    model.tables.store.weight("user")[3] += 1
    assert content_hash(model) == first, "user rows are an input of the graphs"
    model.tables.store.weight("item")[3] += 1
    second = content_hash(model)
    model.heads.towers["retention"][2].bias += 1
    assert len({first, second, content_hash(model)}) == 3
    with pytest.raises(CheckpointError, match="no such file"):
        content_hash(tmp_path / "nowhere")


def test_the_cache_is_built_once_and_appears_whole(cached):
    _, checkpoint, cache, folder, meanwhile = cached
    assert [name.startswith(".building-") for name in meanwhile] == [True], "nothing half-made under the final name"
    assert os.listdir(cache) == [folder.name], "nothing left behind"
    OnnxModels(folder, threads=1, checkpoint=content_hash(checkpoint))
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert export_cached(checkpoint, cache) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


@pytest.mark.parametrize("found", ["nothing", "complete", "incomplete"])
def test_a_complete_entry_of_the_cache_stays_and_an_incomplete_one_goes(cached, tmp_path, found):
    built = shutil.copytree(cached[3], tmp_path / "built")
    target = tmp_path / "target"
    if found != "nothing":
        shutil.copytree(cached[3], target)
        (target / "mark").touch()
    if found == "incomplete":
        (target / "ranker.onnx").unlink()
    assert _is_complete(target) == (found == "complete")
    _publish(built, target)
    assert _is_complete(target)
    assert (target / "mark").exists() == (found == "complete")
