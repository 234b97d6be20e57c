"""The recipes: the fast forward is the stock one, drawing is the product's sampler, training resumes bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detour import UserError, archs, sample
from detour.nano import codec, world
from detour.nano.recipes import base, figures, miniature, training, turbo
from detour.nano.recipes.fast import FastField
from detour.nano.recipes.miniature import Miniature
from detour.weights import Placement, find_model, materialise

CPU = torch.device("cpu")
ARCH = archs.get("zimage")


def lively(seed: int = 0) -> Any:
    """A transformer that has begun to do something: nothing in it is zero."""
    denoiser = miniature.build_transformer(seed)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=drawn))
    return denoiser


@pytest.fixture(scope="module")
def model() -> Miniature:
    return Miniature.of(lively())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("miniature")
    miniature.write(path / training.MODEL, lively().state_dict())
    return path


def test_the_fast_forward_is_the_stock_forward(model: Miniature) -> None:
    texts = ["a large plain red circle on a blue background at the left", "", "a small mip"]
    latents, t = torch.randn(3, 16, 16, 16), torch.tensor([0.1, 0.5, 1.0])
    tokens, padding = model.captions(texts)
    conditions = [{"tokens_LD": row[~pad]} for row, pad in zip(tokens, padding, strict=True)]
    with torch.no_grad():
        found = model.field(latents, t, tokens, padding)
        expected = ARCH.predict(model.denoiser, latents, t, conditions)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert expected.std() > 0.05, "or the test says nothing"
    with pytest.raises(ValueError, match="would pad"):
        FastField(model.denoiser, (4, 4))


def test_gradients_are_those_of_the_stock_forward(model: Miniature) -> None:
    latents, t = torch.randn(2, 16, 16, 16), torch.tensor([0.3, 0.7])
    tokens, padding = model.captions(["a red circle", "a blue square on a white background"])
    conditions = [{"tokens_LD": row[~pad]} for row, pad in zip(tokens, padding, strict=True)]
    grads = []
    for forward in (
        lambda: model.field(latents, t, tokens, padding),
        lambda: ARCH.predict(model.denoiser, latents, t, conditions),
    ):
        model.denoiser.zero_grad()
        forward().square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.denoiser.named_parameters() if p.grad is not None})
    model.denoiser.zero_grad()
    for name, found in grads[0].items():
        torch.testing.assert_close(found, grads[1][name], atol=1e-5, rtol=1e-3, msg=name)
    unused = {name for name, _ in model.denoiser.named_parameters()} - set(grads[0])
    assert unused <= {"x_pad_token"}, "no picture of the world needs padding"


def test_the_whole_model_is_read_and_drawn_with_by_the_product(folder: Path) -> None:
    """`detour sample`'s loop on the written model, and the recipes' batch loop, draw the same picture."""
    source = find_model(str(folder / training.MODEL), components=ARCH.spec.components, denoiser=ARCH.spec.denoiser)
    denoiser = ARCH.build_denoiser(source)
    materialise(denoiser, ARCH.denoiser_tensors(source), Placement(torch.float32, CPU), where="nano")
    text = ARCH.load_text_encoders(source, Placement(torch.float32, CPU))
    vae = ARCH.load_vae(source, torch.float32, CPU)
    prompt = world.prompts(1)[0].text
    request = sample.Request(prompt=prompt, seed=7, width=128, height=128, steps=4, guidance=2.5)
    noise = sample.initial_noise(ARCH.spec, request)
    assert torch.equal(noise, miniature.noise_for([7]))
    conditions = ARCH.encode_prompts(text, request.prompts(ARCH.spec))
    expected = sample.denoise(ARCH, denoiser, ARCH.load_scheduler(source), noise, request, conditions)
    loaded = Miniature.load(folder / training.MODEL)
    found = miniature.rollout(loaded, noise, loaded.captions([prompt]), 4, 2.5)[-1]
    assert (found - expected).norm() / expected.norm() < 0.03, "bf16 against float32"
    pixels = ARCH.decode(vae, found).clamp(-1, 1)
    cells = torch.nn.functional.avg_pool2d(pixels, world.CELL).permute(0, 2, 3, 1).numpy() * 0.5 + 0.5
    assert np.abs(cells - np.clip(codec.decode(found), 0, 1)).mean() < 0.002


def test_few_step_grids_are_inside_the_teachers() -> None:
    for few in (4, 8):
        assert miniature.grid(few) == pytest.approx(miniature.grid(turbo.TEACHER_STEPS)[:: turbo.TEACHER_STEPS // few])
    assert miniature.grid(4) == pytest.approx((1, 0.9, 0.75, 0.5, 0))


def test_pictures_do_not_depend_on_the_batch(model: Miniature) -> None:
    texts = [prompt.text for prompt in world.prompts(3)]
    together = miniature.draw(model, texts, steps=2, guidance=2.0, seed=5)
    alone = miniature.draw(model, texts[1:2], steps=2, guidance=2.0, seed=6)
    assert np.abs(together[1] - alone[0]).max() < 0.05


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BATCH", 2)
    monkeypatch.setattr(training, "_EVERY", 2)
    monkeypatch.setattr(turbo, "SHARD", 2)
    monkeypatch.setattr(turbo, "TEACHER_STEPS", 4)


def average(folder: Path) -> bytes:
    return (folder / training.STATE / "average.safetensors").read_bytes()


SHORT = ["--steps", "4", "--judge", "2", "--judge-every", "100"]


@pytest.mark.slow
def test_training_on_after_a_stop_gives_the_same_bits(
    tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.main(["--out", str(tmp_path / "whole"), *SHORT])
    stopped = ["--out", str(tmp_path / "parts"), *SHORT]
    ended = base.loss_at

    class Stop(Exception):
        pass

    def interrupted(model: Miniature, step: int, **how: Any) -> torch.Tensor:
        if step == 3:
            raise Stop
        return ended(model, step, **how)

    monkeypatch.setattr(base, "loss_at", interrupted)
    with pytest.raises(Stop):
        base.main([*stopped, "--judge-every", "2"])
    monkeypatch.setattr(base, "loss_at", ended)
    with pytest.raises(SystemExit, match="another steps"):
        base.main([*stopped, "--steps", "5"])
    base.main([*stopped, "--judge-every", "2"])
    assert average(tmp_path / "parts") == average(tmp_path / "whole")
    weights = [
        (tmp_path / run / training.MODEL / "transformer" / miniature.WEIGHTS).read_bytes() for run in ("whole", "parts")
    ]
    assert weights[0] == weights[1]
    lines = [json.loads(line) for line in (tmp_path / "parts" / training.LINES).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert {"strict", "few_strict"} <= lines[-1].keys()


def test_no_time_left_still_leaves_a_model(tmp_path: Path, tiny: None) -> None:
    base.main(["--out", str(tmp_path), *SHORT, "--minutes", "0"])
    assert miniature.load_transformer(tmp_path / training.MODEL)


def test_loss_depends_on_the_step_and_the_seed_alone(model: Miniature, tiny: None) -> None:
    with torch.no_grad():
        losses = [
            base.loss_at(model, step, seed=seed, dials=base.DIALS).item()
            for step, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
        ]
    assert losses[0] == losses[1] and len(set(losses)) == 3


@pytest.mark.slow
def test_the_turbo_learns_secants_of_guided_paths(folder: Path, tmp_path: Path, tiny: None) -> None:
    command = ["--base", str(folder), "--out", str(tmp_path / "turbo"), "--few", "2", "--paths", "4", *SHORT]
    with pytest.raises(SystemExit, match="0 of 4 trajectories"):
        turbo.main([*command, "--minutes", "-1"])
    turbo.main(command)
    shards = sorted((tmp_path / "turbo" / "trajectories").iterdir())
    assert [shard.name for shard in shards] == ["0000", "0001"]
    teacher = Miniature.load(folder / training.MODEL)
    facts: dict[str, Any] = json.loads((shards[0] / "texts.json").read_text())["facts"]
    paths = turbo.make_trajectories(teacher, tmp_path / "turbo", 4, facts, stop_at=0)
    assert paths.states_NSCHW.shape == (4, 3, 16, 16, 16) and len(paths.texts) == 4
    told = paths.condition(teacher, torch.arange(2))
    expected = miniature.rollout(teacher, paths.states_NSCHW[:2, 0].float(), told, 4, facts["guidance"])[-1]
    torch.testing.assert_close(paths.states_NSCHW[:2, -1].float(), expected, atol=0.05, rtol=0.05)

    class Secants:
        """A model that knows the paths by heart."""

        captions = teacher.captions

        def velocity(self, z: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
            states = paths.states_NSCHW.float()
            near = (states[:, :-1, None] - z).square().flatten(3).mean(dim=3).flatten(0, 1).argmin(dim=0)
            times = torch.tensor(miniature.grid(2))
            jumps = (states[:, 1:] - states[:, :-1]) / (times[1:] - times[:-1])[:, None, None, None]
            return jumps.flatten(0, 1)[near]

    perfect: Any = Secants()
    assert turbo.loss_at(perfect, paths, 3, seed=0) < 1e-10
    with torch.no_grad():
        assert turbo.loss_at(teacher, paths, 3, seed=0) > 1e-3
    with pytest.raises(SystemExit, match="choose another --out"):
        turbo.main([*command, "--guidance", "2"])


def test_bad_input_to_the_turbo_is_explained(tmp_path: Path, tiny: None) -> None:
    command = ["--base", str(tmp_path), "--out", str(tmp_path / "t")]
    for more, said in (
        (["--few", "3"], "--few 3"),
        (["--few", "2", "--paths", "7"], "--paths 7"),
        (["--few", "2", "--paths", "4"], "is missing"),
    ):
        with pytest.raises(SystemExit, match=said):
            turbo.main([*command, *more])


def test_the_page_has_a_row_for_each_way_of_drawing(folder: Path, tmp_path: Path, tiny: None, monkeypatch: Any) -> None:
    command = ["--base", str(folder), "--out", str(tmp_path), "--few", "2", "-n", "8"]
    kept = [figures.Row(model=name, steps=2, guidance=1.0) for name in ("truth", "base", "turbo")]
    monkeypatch.setattr(figures, "rows", lambda few, guidance: kept)
    monkeypatch.setattr(figures, "flow_matching_loss", lambda model, n: 0.5)
    figures.main(command)
    page = (tmp_path / "figures.md").read_text()
    assert "| truth-2-g1-stated | 1.000" in page, "the judge passes true drawings"
    assert "| base-2-g1-stated | 0.000" in page and "| base-field | 0.5000 |" in page
    assert "turbo" not in page, "no turbo was given"
    assert (tmp_path / "base-2-g1-stated.png").is_file()
    figures.main([*command, "--turbo", str(folder)])
    assert "| turbo-2-g1-stated |" in (tmp_path / "figures.md").read_text()


def test_the_rows_are_what_the_balance_needs() -> None:
    found = {(row.model, row.steps, row.guidance, row.prompts) for row in figures.rows(8, 2.5)}
    assert len(found) == len(figures.rows(8, 2.5)) == 14
    assert {("base", 32, 2.5, "stated"), ("base", 8, 1.0, "stated"), ("turbo", 8, 1.0, "stated")} <= found
    assert {("adapted", steps, 1.0, "stated") for steps in (8, 32)} <= found
    assert {kind for *_, kind in found} == {"stated", "held_out", "unstated"}
    held_out = figures.prompts_of("held_out", 8)
    assert {(p.wanted["shape"], p.wanted["color"]) for p in held_out} <= world.HELD_OUT
    assert all("size" not in p.wanted for p in figures.prompts_of("unstated", 8))
    assert not {p.text for p in figures.prompts_of("stated", 8)} & {p.text for p in world.prompts(4, seed=1)}


def test_the_flow_matching_loss_of_a_known_field_is_known(model: Miniature, tiny: None) -> None:
    class Noise:
        captions = model.captions

        def velocity(self, z: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
            return torch.zeros_like(z)

    nothing: Any = Noise()
    latents = codec.encode(world.render(world.scenes(64)))
    assert figures.flow_matching_loss(nothing, 64) == pytest.approx(1 + latents.square().mean().item(), rel=0.1)


def test_the_rate_warms_up_and_falls() -> None:
    plan = training.Plan(steps=1000, warmup=10)
    shares = [plan.share(step) for step in range(1000)]
    assert shares[0] == 0.1 and shares[9] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True) and shares[-1] == pytest.approx(0.02, abs=1e-3)
    assert replace(plan, steps=5).share(7) <= 1


def test_only_matrices_of_attention_and_feed_forward_are_muons() -> None:
    names = {name: training._for_muon(name, p) for name, p in miniature.build_transformer().named_parameters()}
    chosen = {name.split(".", 2)[-1] for name, muon in names.items() if muon}
    assert chosen == {f"attention.to_{part}.weight" for part in ("q", "k", "v", "out.0")} | {
        f"feed_forward.w{n}.weight" for n in (1, 2, 3)
    }


def test_a_missing_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="OUT/model"):
        miniature.load_transformer(tmp_path)
