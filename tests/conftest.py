"""What every test shares: a quiet, offline, single-threaded process, GPU tests left out where there is no GPU, a tiny model."""

import os

import pytest

from hstu_lab import environment

for name, value in {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}.items():
    os.environ.setdefault(name, value)  # before torch is imported: tiny operators lose more to threads than they gain

GPU_TESTS_LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # after -k and -m, to count only what would have run
def pytest_collection_modifyitems(config, items):
    left_out = [] if environment.machine().gpu else [item for item in items if item.get_closest_marker("gpu")]
    config.stash[GPU_TESTS_LEFT_OUT] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(GPU_TESTS_LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} GPU tests not run here: no NVIDIA GPU", yellow=True)


@pytest.fixture(scope="session", autouse=True)
def _report_gpu_tests(record_testsuite_property, pytestconfig):
    """Puts the count where tests/run.py reads it."""
    record_testsuite_property("gpu_tests_left_out", pytestconfig.stash[GPU_TESTS_LEFT_OUT])


@pytest.fixture(scope="session")
def tiny_model():
    """The tiny preset with random weights, biases and side features: nothing hides behind a zero. Shared, so do not change it."""
    import torch

    from hstu_lab.config import preset
    from hstu_lab.model import HSTU

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HSTU(preset("tiny"))
        for name, parameter in model.named_parameters():
            if "bias" in name or "down" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        for row, (_, rows) in zip(model.tables.item_features, model.config.side_features):
            row[1:] = torch.randint(1, rows, (model.config.num_items - 1,))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_world():
    """A log of 200 users of the tiny preset's synthetic world."""
    from hstu_lab.config import preset
    from hstu_lab.events import World

    return World(preset("tiny"), seed=3).generate(200, seed=3)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_model, tiny_world):
    """`tiny_model` saved with the catalog and users of `tiny_world`, as training would."""
    import json

    from hstu_lab.model import save_checkpoint

    folder = save_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))
    tiny_world.catalog.save(folder / "catalog.json")
    (folder / "users.json").write_text(json.dumps(tiny_world.users))
    return folder


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    """vLLM with `tiny_model`, in this process."""
    from hstu_lab.vllm_engine import Engine, EngineOptions

    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=8 << 20)) as engine:
        yield engine


@pytest.fixture(scope="session")
def draw_prompts(tiny_model):
    """(seed, lengths) -> packed histories of so many tokens for `tiny_model`, each of another user."""
    import torch

    def draw(seed, lengths):
        generator, base = torch.Generator().manual_seed(seed), tiny_model.config.user_token_base
        drawn = [torch.randint(1, 500, (n - 1,), generator=generator).tolist() for n in lengths]
        return [[base + 1 + i, *tokens] for i, tokens in enumerate(drawn)]

    return draw


@pytest.fixture(scope="session")
def small_onnx(tmp_path_factory):
    """precision -> folder of the shipped checkpoint's ONNX parts; int8 is calibrated with the sample log."""
    from hstu_lab.config import PRECISIONS
    from hstu_lab.onnx_export import export_cached
    from hstu_lab.pipeline import SHIPPED_CHECKPOINT

    root = tmp_path_factory.mktemp("small-onnx")
    return {precision: export_cached(SHIPPED_CHECKPOINT, root, precision=precision, progress=False) for precision in PRECISIONS}
