"""Many tasks in one session: each its own answers, whatever was run before, beside or instead of it."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_fixtures import make_adapter, make_model

from loracle.export import DecoderSession, Deployment, Sampling, export, generate
from loracle.reference import ConfigError, DataError, FileError

Array = np.ndarray[Any, Any]
PROMPTS = ["one", "and two", "three of them"]
ADAPTERS = {"french": ("q_proj", "v_proj"), "german": ("v_proj", "gate_proj"), "dutch": ("o_proj",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters, and each of them baked."""
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base")
    export(base, root / "baked base")
    kinds = {**ADAPTERS, "other french": ADAPTERS["french"]}
    for seed, (name, targets) in enumerate(kinds.items(), 1):
        make_adapter(root / name, base, targets, seed=seed)
        export(base, root / f"baked {name}", root / name)
    return root


def add(models: Path, folder: Path, name: str, adapter: str | None = None, **options: Any) -> None:
    export(models / "base", folder, models / (adapter or name), form="swappable", name=name, **options)


@pytest.fixture(scope="module")
def made(models: Path) -> Path:
    folder = models / "deployment"
    for name in ADAPTERS:
        add(models, folder, name)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A deployment of one's own."""
    return Path(shutil.copytree(made, tmp_path / "deployment"))


def tokens_of(
    deployment: Deployment, task: str | None, prompts: list[str], count: int = 12
) -> list[list[int]]:
    found = deployment.generate(task, prompts, max_new_tokens=count)
    return [list(answer.tokens) for answer in found]


def baked(
    models: Path, name: str, deployment: Deployment, prompts: list[str], count: int = 12
) -> list[list[int]]:
    """The baked form's answers."""
    tokens = [deployment.text.encode_prompt(prompt) for prompt in prompts]
    session = DecoderSession(models / f"baked {name}", 60, batch=len(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    for row, token in generate(session, tokens, count, stop=deployment.text.stop):
        answers[row].append(token)
    return answers


def test_each_task_answers_as_its_baked_form_in_any_order(models: Path, made: Path) -> None:
    deployment = Deployment(made)
    expected = {name: baked(models, name, deployment, PROMPTS) for name in ("base", *ADAPTERS)}
    assert len({str(own) for own in expected.values()}) == len(expected)
    for name in ("french", "german", "base", "dutch", "french", "base", "german"):
        assert tokens_of(deployment, None if name == "base" else name, PROMPTS) == expected[name]


def test_tasks_are_listed_sorted(made: Path) -> None:
    assert Deployment(made).tasks == ("dutch", "french", "german")


def test_threads_that_run_different_tasks_at_a_time_each_get_their_own(models: Path, made: Path) -> None:
    deployment = Deployment(made, threads=1)
    expected = {name: baked(models, name, deployment, PROMPTS[:1]) for name in ADAPTERS}
    wrong: list[str] = []

    def ask(name: str) -> None:
        for _ in range(10):
            if tokens_of(deployment, name, PROMPTS[:1]) != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in [*ADAPTERS] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_least_recently_used_task_goes_first(made: Path) -> None:
    sizes = Deployment(made)
    for name in ADAPTERS:
        sizes.load(name)
    assert sizes.loaded == ("french", "german", "dutch")
    deployment = Deployment(made, max_bytes=sizes.loaded_bytes - 1)
    deployment.load("french")
    deployment.load("german")
    deployment.load("french")
    deployment.load("dutch")
    assert deployment.loaded == ("french", "dutch")
    assert deployment.loaded_bytes < sizes.loaded_bytes


def test_one_task_is_kept_whatever_its_size(made: Path) -> None:
    deployment = Deployment(made, max_bytes=0)
    deployment.load("french")
    assert deployment.loaded == ("french",)
    deployment.load("dutch")
    assert deployment.loaded == ("dutch",)


def test_an_evicted_task_is_loaded_again(models: Path, made: Path) -> None:
    deployment = Deployment(made)
    first = tokens_of(deployment, "french", PROMPTS)
    deployment.evict("french")
    assert deployment.loaded == ()
    assert tokens_of(deployment, "french", PROMPTS) == first


def test_a_decoder_goes_on_when_its_task_is_removed_and_evicted(models: Path, folder: Path) -> None:
    deployment = Deployment(folder)
    expected = tokens_of(deployment, "french", PROMPTS[:1])
    prompt = deployment.text.encode_prompt(PROMPTS[0])
    session = deployment.decoder("french", 60)
    steps = generate(session, [prompt], 12, stop=deployment.text.stop)
    found = [next(steps)[1]]
    (folder / "french.task.safetensors").unlink()
    deployment.evict("french")
    assert found + [token for _, token in steps] == expected[0]
    with pytest.raises(FileError, match=r"french.*\(dutch, german\)"):
        deployment.load("french")


def test_a_task_whose_file_is_gone_is_not_answered_from_memory(folder: Path) -> None:
    deployment = Deployment(folder)
    deployment.load("french")
    (folder / "french.task.safetensors").unlink()
    with pytest.raises(FileError, match="french"):
        deployment.generate("french", PROMPTS)
    assert deployment.loaded == ()


def test_a_replaced_task_is_loaded_anew(models: Path, folder: Path) -> None:
    deployment = Deployment(folder)
    tokens_of(deployment, "french", PROMPTS)
    add(models, folder, "french", "german", replace=True)
    assert tokens_of(deployment, "french", PROMPTS) == tokens_of(deployment, "german", PROMPTS)


def test_a_task_with_more_inputs_can_come_while_the_deployment_is_open(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deployment"
    add(models, folder, "french")
    deployment = Deployment(folder)
    running = deployment.decoder("french", 60)
    add(models, folder, "german")
    assert tokens_of(deployment, "german", PROMPTS) == baked(models, "german", deployment, PROMPTS)
    assert tokens_of(deployment, "french", PROMPTS) == baked(models, "french", deployment, PROMPTS)
    running.prefill([[1, 2, 3]])


@pytest.mark.parametrize("swappable", [False, True])
def test_adapters_merged_on_load_have_the_bits_of_an_export(
    models: Path, tmp_path: Path, swappable: bool
) -> None:
    """With and without tasks in the folder."""
    folder = tmp_path / "deployment"
    if swappable:
        add(models, folder, "dutch")
    else:
        export(models / "base", folder, models / "french", form="linked", name="linked")
    deployment = Deployment(folder, adapters={"new": models / "german", "other": models / "french"})
    assert set(deployment.tasks) == {"new", "other"} | ({"dutch"} if swappable else set())
    stored = tmp_path / "stored"
    for name in ("german", "french"):
        add(models, stored, name)
    expected = Deployment(stored)
    inputs = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    for name, entry in {e.name: e for e in expected._session.get_inputs()}.items():
        if name.startswith("past"):
            inputs[name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    for name, own in (("new", "german"), ("other", "french")):
        assert tokens_of(deployment, name, PROMPTS) == baked(models, own, deployment, PROMPTS)
    if swappable:
        assert tokens_of(deployment, "dutch", PROMPTS) == baked(models, "dutch", deployment, PROMPTS)


def test_merged_tensors_are_those_of_the_task_s_file(models: Path, made: Path) -> None:
    from safetensors.numpy import load_file

    from loracle.export.merged_task import merge_task

    merged = merge_task(made, models / "german")
    stored = load_file(made / "german.task.safetensors")
    assert merged.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(merged[name], array, strict=True)


def test_an_adapter_is_not_merged_into_a_base_that_was_rounded(models: Path, tmp_path: Path) -> None:
    add(models, tmp_path / "half", "french", dtype="fp16")
    deployment = Deployment(tmp_path / "half", adapters={"new": models / "german"})
    with pytest.raises(ConfigError, match="base in float32"):
        deployment.load("new")


def test_an_adapter_cannot_take_a_task_s_name(models: Path, made: Path) -> None:
    for name in ("french", "a/b", "model"):
        with pytest.raises(ConfigError, match="adapters"):
            Deployment(made, adapters={name: models / "german"})


def test_sampling_draws_the_same_as_the_baked_form(models: Path, made: Path) -> None:
    deployment = Deployment(made)
    sampling = Sampling(temperature=1.0, seed=3)
    tokens = deployment.text.encode_prompt(PROMPTS[0])
    session = DecoderSession(models / "baked german", 60)
    expected = [
        token for _, token in generate(session, [tokens], 12, sampling=sampling, stop=deployment.text.stop)
    ]
    (answer,) = deployment.generate("german", PROMPTS[:1], max_new_tokens=12, sampling=sampling)
    assert list(answer.tokens) == expected


def test_run_takes_the_graph_s_inputs_and_gives_its_outputs(made: Path) -> None:
    deployment = Deployment(made)
    session = deployment.decoder("french", 8)
    expected = session.prefill([[5, 6, 7]])
    inputs: dict[str, Array] = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.session.get_inputs()
        if entry.name.startswith("past")
    }
    inputs |= {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    found = deployment.run("french", inputs)
    np.testing.assert_array_equal(found["logits"][:, -1], expected)
    assert not np.array_equal(deployment.run(None, inputs)["logits"], found["logits"])
    with pytest.raises(DataError, match="other"):
        deployment.run("french", {**inputs, "other": np.zeros(1)})
    with pytest.raises(DataError, match="refuses"):
        deployment.run("french", {**inputs, "input_ids": np.zeros((1, 3), np.float32)})


def test_a_file_of_another_model_is_refused(models: Path, folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "french.task.safetensors")
    name = next(iter(tensors))
    for changed in (
        {f"{name}x": tensors[name]},
        {name: tensors[name][:-1].copy()},
        {name: tensors[name].astype(np.float16)},
    ):
        save_file(changed, folder / "wrong.task.safetensors")
        with pytest.raises(FileError, match=f"wrong.task.safetensors: {name}.*another model"):
            Deployment(folder).load("wrong")


def test_prompts_without_text_are_refused(made: Path) -> None:
    deployment = Deployment(made)
    for prompts in ([], [""]):
        with pytest.raises(DataError, match="prompts"):
            deployment.generate("french", prompts, raw=True)


def test_it_needs_neither_torch_nor_onnx(made: Path) -> None:
    program = (
        "import sys; from loracle.export import Deployment; "
        f"print(Deployment({str(made)!r}).generate('french', ['one'], max_new_tokens=2)[0].tokens); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'onnx', 'onnx_ir'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_decoder_that_is_done_with_goes_on_with_another_task(models: Path, made: Path) -> None:
    deployment = Deployment(made, adapters={"twin": models / "other french"})
    expected = {name: baked(models, name, deployment, PROMPTS[:1])[0] for name in ("french", "other french")}
    prompt = deployment.text.encode_prompt(PROMPTS[0])
    session = deployment.decoder("french", 60)
    for name, own in (("twin", "other french"), ("french", "french")):
        assert deployment.decoder(name, 60, reuse=session) is session
        steps = generate(session, [prompt], 12, stop=deployment.text.stop)
        assert [token for _, token in steps] == expected[own]


def test_a_decoder_that_does_not_fit_is_not_reused(made: Path) -> None:
    deployment = Deployment(made)
    session = deployment.decoder("french", 60)
    for other in (("german", 60), (None, 60), ("french", 61), ("french", 60, 2)):
        assert deployment.decoder(*other, reuse=session) is not session
    assert Deployment(made).decoder("french", 60, reuse=session) is not session


def test_a_reused_decoder_has_all_its_rows_again(models: Path, made: Path) -> None:
    deployment = Deployment(made)
    session = deployment.decoder("french", 60, 2)
    session.prefill([[1, 2], [3]])
    session.keep([1])
    assert deployment.decoder("french", 60, 2, reuse=session) is session
    fresh = deployment.decoder("french", 60, 2)
    np.testing.assert_array_equal(session.prefill([[5], [6, 7]]), fresh.prefill([[5], [6, 7]]))
