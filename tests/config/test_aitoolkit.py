"""ai-toolkit's job files: what they mean there is what the job does here, or it is said."""

from pathlib import Path

import pytest
import yaml

from detour import UserError
from detour.config import aitoolkit_keys as keys
from detour.config.aitoolkit import recognise, translate
from detour.config.aitoolkit_part import Part
from detour.config.load import JobError, load_job

CASE = Path(__file__).parent.parent / "cases" / "aitoolkit_style.yaml"

SMALL = """\
job: extension
config:
  name: lena
  process:
    - type: sd_trainer
      training_folder: out
      network: {type: lora, linear: 16, linear_alpha: 16}
      model: {name_or_path: some/model, arch: zimage}
      datasets:
        - folder_path: pictures
      train: {steps: 500, lr: 1e-4}
      sample:
        prompts: [a cat]
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads text as job.yaml in the current folder, so that messages begin with its bare name."""
    monkeypatch.chdir(tmp_path)

    def _load(text):
        Path("job.yaml").write_text(text)
        return load_job(Path("job.yaml"))

    return _load


@pytest.fixture
def having(load):
    """SMALL with further options in one section: the process that comes out, and the notes."""

    def _having(section, **options):
        data = yaml.safe_load(SMALL)
        process = data["config"]["process"][0]
        target = process if section == "process" else process.setdefault(section, {})
        target = target[0] if isinstance(target, list) else target
        target.update(options)
        loaded = load(yaml.safe_dump(data, sort_keys=False))
        return loaded.job.config.process[0], [note.partition(": ")[2] for note in loaded.notes]

    return _having


def refused(call, *args, **kwargs):
    with pytest.raises(JobError) as caught:
        call(*args, **kwargs)
    return [f"{mistake.option}: {mistake.what}" for mistake in caught.value.mistakes]


# The file that ai-toolkit's form writes for Z-Image Turbo.


def test_the_forms_own_file_is_read_as_it_stands():
    loaded = load_job(CASE)
    config = loaded.job.config
    process = config.process[0]
    assert (config.output_name, config.output_folder, len(config.process)) == ("my_first_lora_v1", Path("output"), 1)
    assert loaded.job.meta == {"name": "my_first_lora_v1", "version": "1.0"}
    assert (process.type, process.device, process.trigger_word) == ("train", "cuda", "p3rs0n")
    model = process.model
    assert (model.arch, model.variant, model.name_or_path) == ("zimage", "turbo", "Tongyi-MAI/Z-Image-Turbo")
    assert model.assistant_lora_path == (
        "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors"
    )
    assert (model.quantize, model.qtype, model.quantize_te, model.qtype_te) == (True, "float8", True, "float8")
    assert (model.low_vram, model.layer_offloading) == (True, False)
    network = process.network
    assert (network.type, network.linear, network.linear_alpha, network.exclude) == ("lora", 32, None, [])
    (dataset,) = process.datasets
    assert (dataset.folder_path, dataset.default_caption, dataset.caption_ext) == (Path("/path/to/images"), "", "txt")
    assert (dataset.resolution, dataset.caption_dropout_rate) == ([512, 768, 1024], 0.05)
    train = process.train
    assert (train.steps, train.lr, train.optimizer) == (3000, 1e-4, "adamw8bit")
    assert train.optimizer_params == {"eps": 1e-6, "weight_decay": 1e-4}
    assert (train.timestep_type, train.timestep_bias, train.loss_type) == ("weighted", "balanced", "mse")
    assert (train.ema_config.use_ema, train.dtype, train.max_grad_norm) == (False, "bf16", 1.0)
    sample = process.sample
    assert [(prompt.prompt, prompt.seed) for prompt in sample.prompts] == [
        ("p3rs0n holding a coffee cup in a cozy cafe", None),
        ("a bear building a log cabin in the snow covered mountains", 7),
    ]
    assert (sample.sample_steps, sample.guidance_scale, sample.seed, sample.walk_seed) == (9, 1.0, 42, True)
    assert (process.save.dtype, process.save.save_every, process.save.max_step_saves_to_keep) == ("bf16", 250, 4)
    assert loaded.notes == [f"{CASE}:15: network.conv: 16: zimage has no convolutions to adapt"]
    assert loaded.place("train.lr") == f"{CASE}:58"


def test_its_own_defaults_hold_and_are_listed(load):
    """A file without lr trains at 1e-6 there, and so here; but nobody should have to find that out."""
    process = "{type: sd_trainer, network: {}, model: {arch: zimage}, datasets: [{folder_path: x}]}"
    loaded = load("config: {name: a, process: [" + process + "]}")
    process = loaded.job.config.process[0]
    assert (process.train.lr, process.train.steps, process.train.dtype) == (1e-6, 1000, "fp32")
    assert (process.train.timestep_type, process.network.linear, process.datasets[0].resolution) == (
        "sigmoid",
        4,
        [512],
    )
    assert (process.save.save_every, process.save.max_step_saves_to_keep, process.save.dtype) == (1000, 5, "fp16")
    (note,) = [note for note in loaded.notes if "defaults hold" in note]
    for said in (
        "network.linear 4",
        "train.steps 1000",
        "train.lr 1e-06",
        "datasets[0].resolution 512",
        "save.dtype fp16",
    ):
        assert said in note
    assert "batch_size" not in note  # is the same here
    assert "defaults hold" not in "".join(load_job(CASE).notes)


@pytest.mark.parametrize(
    ("data", "theirs"),
    [
        ({"job": "extension"}, True),
        ({"config": {"process": [{"type": "ui_trainer"}]}}, True),
        ({"config": {"process": [{"type": "concept_slider"}]}}, True),
        ({"config": {"name": "a"}}, True),
        ({"config": {"name": "a", "process": [{"type": "train"}]}}, False),
        ({"config": {"name": "a", "output_name": "a"}}, False),
        ({"config": {"output_name": "a", "process": [{"type": "sd_triner"}]}}, False),
        ({"config": 5}, False),
        ({}, False),
    ],
)
def test_the_layout_is_recognised(data, theirs):
    assert recognise(data) is theirs


# Mistakes, all at once, with the lines and the names of the file.


def test_every_mistake_in_one_go(load):
    text = """\
job: extension
config:
  name: "x"
  process:
    - type: sd_triner
      training_folder: out
      network: {type: lycoris, linear: 16, foo: 1}
      model: {arch: flux, qtype: uint3, quantize: true, layer_offloading: true}
      datasets:
        - folder_path: ${HOME}/x
          network_weight: 2
          resolution: [512, 12]
          capton_ext: txt
      train:
        diff_output_preservation: true
        do_guidance_loss: yes
        train_text_encoder: on
        optimizer: automagik
        learning_rate: 3
        lr: abc
        loss_type: stepped
        save_every: 100
        steps: 0
"""
    with pytest.raises(JobError) as caught:
        load(text)
    found = [(int(mistake.place.split(":")[1]), mistake.option, mistake.what) for mistake in caught.value.mistakes]
    assert [(line, option) for line, option, _ in found] == [
        (5, "type"), (7, "network.foo"), (7, "network.type"), (8, "model.qtype"), (8, "model.layer_offloading"),
        (10, "datasets[0].folder_path"), (11, "datasets[0].network_weight"), (12, "datasets[0].resolution[1]"),
        (13, "datasets[0].capton_ext"), (15, "train.diff_output_preservation"), (16, "train.do_guidance_loss"),
        (17, "train.train_text_encoder"), (18, "train.optimizer"), (19, "train.learning_rate"), (20, "train.lr"),
        (21, "train.loss_type"), (22, "train.save_every"), (23, "train.steps"),
    ]  # fmt: skip
    said = {option: what for _, option, what in found}
    assert said["type"].endswith("; did you mean 'sd_trainer'?")
    assert said["network.type"] == "'lycoris' is not available in Detour; allowed: lora, lokr, dora"
    assert said["train.diff_output_preservation"].endswith("; remove it")
    assert said["datasets[0].network_weight"].endswith("; remove it or set it to 1")
    assert said["datasets[0].capton_ext"] == "ai-toolkit has no such option; did you mean 'caption_ext'?"
    assert "not one of adamw, adamw8bit," in said["train.optimizer"]
    assert said["train.learning_rate"] == "ai-toolkit has no such option; there it is 'lr'"
    assert said["train.save_every"] == "ai-toolkit has no such option here; it belongs in save"
    assert "${HOME} is not filled in from the environment" in said["datasets[0].folder_path"]


SECTIONS = {
    "process": keys.PROCESS, "model": keys.MODEL, "network": keys.NETWORK, "save": keys.SAVE, "datasets": keys.DATASET,
    "train": keys.TRAIN, "sample": keys.SAMPLE, "logging": keys.LOGGING,
}  # fmt: skip
RULES = [(section, name, rule) for section, rules in SECTIONS.items() for name, rule in rules.items()]


def test_the_table_is_not_empty():
    assert len(RULES) > 250
    assert {rule.kind for _, _, rule in RULES} == {"read", "silent", "noted", "refused"}


def test_what_would_change_the_training_is_refused(having):
    for section, name, rule in RULES:
        if rule.kind == "refused":
            (mistake,) = refused(having, section, **{name: "anything"})
            assert mistake.split(":")[0].rpartition(".")[2] == name
            assert rule.why in mistake
            for value in (*rule.fine, None):
                having(section, **{name: value})


def test_what_is_left_out_is_listed(having):
    base = having("train")[1]
    for section, name, rule in RULES:
        if rule.kind == "noted":
            (note,) = [note for note in having(section, **{name: "anything"})[1] if note not in base]
            assert name in note
            assert note.endswith(f": anything: {rule.why}")
            for value in (*rule.fine, None):
                assert having(section, **{name: value})[1] == base


def test_what_asks_for_nothing_is_passed_over(having):
    plain, base = having("train")
    for section in SECTIONS:
        silent = {name: "anything" for at, name, rule in RULES if at == section and rule.kind == "silent"}
        assert having(section, **silent) == (plain, base)


def test_every_option_marked_as_read_is_read(monkeypatch):
    read = {}
    original = Part.has

    def has(self, name):
        read.setdefault(id(self.rules), set()).add(name)
        return original(self, name)

    monkeypatch.setattr(Part, "has", has)
    for kind in ("lora", "lokr"):
        data = yaml.safe_load(SMALL)
        process = data["config"]["process"][0]
        process["network"] = {"type": kind, "network_kwargs": {}}
        process["train"] = {"ema_config": {"use_ema": True}, "validation_config": {}, "optimizer": "prodigy"}
        process["datasets"][0]["mask_path"] = "masks"
        process["sample"]["samples"] = [{"prompt": "a"}]
        translate(data)
        process["sample"], process["model"] = {}, {"name_or_path": "x", "quantize": True}
        process["datasets"] = [{"dataset_path": "x"}]
        translate(data)
    for name in ("constant_with_warmup", "constant", "cosine", "linear"):
        process["train"] = {"lr_scheduler": name, "lr_scheduler_params": {"start_factor": 1.0}}
        translate(data)
    tables = [
        *SECTIONS.values(),
        keys.TOP,
        keys.CONFIG,
        keys.NETWORK_KWARGS,
        keys.EMA,
        keys.SCHEDULER,
        keys.SAMPLE_ITEM,
    ]
    for rules in tables:
        wanted = {name for name, rule in rules.items() if rule.kind == "read"}
        assert wanted - read[id(rules)] == set()


# Section by section.


def test_rank_and_alpha(having):
    """For transformers alpha is the rank, whatever the file says; UNets keep theirs."""
    process, notes = having("network", linear=16, linear_alpha=8)
    assert (process.network.linear, process.network.linear_alpha) == (16, None)
    assert "network.linear_alpha: 8: ai-toolkit trains zimage with alpha = rank; so does this job" in notes
    process, notes = having("network", linear=16, rank=8, linear_alpha=8)
    assert process.network.linear == 8
    assert not [note for note in notes if "alpha" in note]
    assert having("model", arch="sdxl")[0].network.linear_alpha == 16


def test_layer_names_become_patterns(having):
    process, _ = having(
        "network",
        network_kwargs={
            "only_if_contains": ["transformer.layers.1.", "attention"],
            "ignore_if_contains": ["layers$$0$$", "to_(q)"],
        },
    )
    assert process.network.include == [r"^layers\.1\.", "attention"]
    assert process.network.exclude == [r"layers\.0\.", r"to_\(q\)"]
    assert "rank_dropout" in refused(having, "network", network_kwargs={"rank_dropout": 0.1})[0]


def test_lokr_and_convolutions(having):
    process, notes = having("network", type="lokr", lokr_factor=8, conv=16, conv_alpha=16)
    assert (process.network.type, process.network.lokr_full_rank, process.network.lokr_factor) == ("lokr", True, 8)
    assert "network.conv: 16: zimage has no convolutions to adapt" in notes
    assert having("network", type="LoRA", lokr_full_rank=True)[0].network.lokr_full_rank is False
    assert having("network", type="dora")[0].network.type == "dora"


def test_without_a_network_the_whole_model_is_trained(load):
    loaded = load("\n".join(line for line in SMALL.splitlines() if "network:" not in line))
    assert loaded.job.config.process[0].network.type == "full"
    assert any("the whole denoiser is trained" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("options", "arch"),
    [
        ({"arch": "zimage:turbo"}, "zimage"), ({"arch": "sd15"}, "sd1"), ({"arch": None}, "sd1"),
        ({"arch": None, "is_flux": True}, "flux"), ({"arch": None, "is_xl": "yes"}, "sdxl"),
        ({"arch": None, "is_pixart": True, "is_pixart_sigma": True}, "pixart_sigma"),
        ({"arch": None, "is_xl": True, "is_vega": True}, "vega"), ({"arch": "zimage", "is_flux": True}, "zimage"),
    ],
)  # fmt: skip
def test_architectures(having, options, arch):
    assert having("model", **options)[0].model.arch == arch


def test_an_architecture_that_detour_lacks(having):
    (mistake,) = refused(having, "model", arch="qwen_image")
    assert mistake.startswith("model.arch: 'qwen_image' is not one of sd1, sd2,")


def test_quantisation(having):
    assert having("model", quantize=True)[0].model.quantize_te is True  # theirs: the text encoder follows
    model = having("model", quantize=True, quantize_te=False, qtype_te="bitnet")[0].model
    assert (model.quantize_te, model.qtype, model.qtype_te) == (False, "float8", None)
    process, notes = having("model", quantize=True, qtype="uint4")
    assert process.model.qtype == "nf4"
    assert "model.qtype: uint4: runs as nf4 (docs/options.md, quantisation)" in notes
    assert refused(having, "model", quantize=True, qtype="uint3")[0].startswith("model.qtype: 'uint3' is not one of")
    assert "accuracy recovery" in refused(having, "model", quantize=True, qtype="uint4|some/adapter")[0]


@pytest.mark.parametrize("option", ["layer_offloading", "auto_memory"])
def test_layer_offloading_is_refused(having, option):
    (mistake,) = refused(having, "model", **{option: True})
    assert "layer_offloading is not built yet" in mistake


@pytest.mark.parametrize(
    ("theirs", "ours"), [("float16", "fp16"), ("bf16", "bf16"), ("float32", "fp32"), ("half", "fp16")]
)
def test_types_by_all_their_names(having, theirs, ours):
    assert having("save", dtype=theirs)[0].save.dtype == ours
    if ours != "fp16":
        assert having("train", dtype=theirs)[0].train.dtype == ours


def test_types_that_are_not_there(having):
    assert "is not one of" in refused(having, "train", dtype="float16")[0]
    assert "is not one of" in refused(having, "save", dtype="float8")[0]


def test_datasets(having):
    process, notes = having(
        "datasets", is_reg=False, mask_path="masks", mask_min_value=0.2, caption_dropout_rate=0.1, num_repeats=3,
        resolution=[512, 768], flip_x=True, flip_y=True, random_crop=True, default_caption="", trigger_word="t",
        loss_multiplier=0.5, shuffle_tokens=True, keep_tokens=2, caption_ext=".caption", num_workers=4,
        alpha_mask=False, cache_latents_to_disk=True, network_weight=1.0, controls=[], buckets=False,
    )  # fmt: skip
    (found,) = process.datasets
    assert (found.mask_path, found.mask_min_value, found.caption_dropout_rate) == (Path("masks"), 0.2, 0.1)
    assert (found.num_repeats, found.resolution, found.flip_x, found.flip_y) == (3, [512, 768], True, True)
    assert (found.crop, found.default_caption, found.trigger_word, found.loss_weight) == ("random", "", "t", 0.5)
    assert (found.shuffle_tokens, found.keep_tokens, found.caption_ext) == (True, 2, "caption")
    assert process.train.num_workers == 4
    assert "datasets[0].buckets: false: pictures keep their shape (buckets are always on)" in notes


def test_dataset_forms_of_old(having):
    data = yaml.safe_load(SMALL)["config"]["process"][0]["datasets"][0]
    assert data == {"folder_path": "pictures"}
    process, _ = having("datasets", folder_path=None, dataset_path="other", caption_type="caption")
    assert (process.datasets[0].folder_path, process.datasets[0].caption_ext) == (Path("other"), "caption")
    assert "captions in a .json are not read" in refused(having, "datasets", folder_path=None, dataset_path="x.json")[0]
    assert "folder_path: missing" in refused(having, "datasets", folder_path=None)[0]
    assert "train with train.batch_size (1)" in refused(having, "datasets", batch_size=4)[0]
    assert having("process", trigger_word="")[0].trigger_word is None
    assert refused(having, "process", datasets=[]) == ["datasets: missing; give at least one, with its folder_path"]


def test_a_missing_default_caption_is_not_an_empty_one(having):
    """An empty one is the user's word that pictures may lack captions. Nothing at all is not."""
    assert having("datasets", default_caption="")[0].datasets[0].default_caption == ""
    assert having("datasets")[0].datasets[0].default_caption is None


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("adamw", "adamw", ""), ("AdamW8bit", "adamw8bit", ""), ("adam", "adamw", "without weight decay"),
        ("adam8bit", "adamw8bit", "without weight decay"), ("adamw8", "adamw8bit", "bitsandbytes"),
        ("lion", "lion", ""), ("lion8bit", "lion", "32 bits"), ("prodigyopt", "prodigy", ""),
        ("prodigy8bit", "prodigy", "32 bits"), ("adafactor", "adafactor", ""),
    ],
)  # fmt: skip
def test_optimizers(having, theirs, ours, said):
    process, notes = having("train", optimizer=theirs, optimizer_params={"weight_decay": 0.1})
    assert process.train.optimizer == ours
    assert process.train.optimizer_params["weight_decay"] == 0.1
    assert ("eps" in process.train.optimizer_params) == (ours in ("adamw", "adamw8bit", "prodigy"))
    found = [note for note in notes if note.startswith("train.optimizer:")]
    assert bool(found) == bool(said)
    assert not said or said in found[0]


@pytest.mark.parametrize("name", ["automagic", "ademamix8bit", "adagrad", "dadaptationlion"])
def test_optimizers_that_are_not_there(having, name):
    (mistake,) = refused(having, "train", optimizer=name)
    assert mistake.startswith(f"train.optimizer: '{name}' is not one of adamw, adamw8bit,")


def test_adam_without_weight_decay_is_adam(having):
    assert having("train", optimizer="adam")[0].train.optimizer_params == {"eps": 1e-6, "weight_decay": 0.0}


def test_prodigy_takes_a_learning_rate_of_one(having):
    process, notes = having("train", optimizer="prodigy", lr=1e-4)
    assert process.train.lr == 1.0
    assert "train.lr: 0.0001: ai-toolkit runs prodigy with 1.0 instead; so does this job" in notes
    assert having("train", optimizer="prodigy", lr=0.5)[0].train.lr == 0.5


def test_adafactor_is_not_clipped(having):
    process, notes = having("train", optimizer="adafactor", max_grad_norm=1.0)
    assert process.train.max_grad_norm == 0
    assert any(note.startswith("train.max_grad_norm: 1.0: ai-toolkit does not clip") for note in notes)


def test_schedules(having):
    def schedule(name, **params):
        train = having("train", lr=1e-4, lr_scheduler=name, lr_scheduler_params=params)[0].train
        return train.lr_scheduler, train.lr_warmup_steps, train.lr_min_ratio

    assert schedule("constant") == ("constant", 0, 0)
    assert schedule("constant_with_warmup") == ("constant", 1000, 0)
    assert schedule("constant_with_warmup", num_warmup_steps=50) == ("constant", 50, 0)
    assert schedule("cosine", eta_min=1e-5) == ("cosine", 0, pytest.approx(0.1))
    assert schedule("cosine_with_restarts") == ("cosine_with_restarts", 0, 0)
    assert schedule("linear", start_factor=1.0, end_factor=0.2) == ("linear", 0, 0.2)
    assert "rises from a third" in refused(schedule, "linear")[0]
    assert "is not one of constant," in refused(schedule, "step")[0]
    assert "write the product into train.lr: 5e-05" in refused(schedule, "constant", factor=0.5)[0]
    assert "T_max" in refused(schedule, "cosine", T_max=5)[0]


@pytest.mark.parametrize(
    ("theirs", "ours"), [("content", "high_noise"), ("style", "low_noise"), ("balanced", "balanced")]
)
def test_bias(having, theirs, ours):
    assert having("train", content_or_style=theirs)[0].train.timestep_bias == ours


def test_bias_of_fixed_times_has_no_effect_there(having):
    process, notes = having("train", content_or_style="style", timestep_type="eight_step", min_denoising_steps=100)
    assert (process.train.timestep_bias, process.train.max_timestep) == ("balanced", 1.0)
    assert len([note for note in notes if "has no effect with eight_step" in note]) == 2


def test_limits_are_places_in_a_falling_list(having):
    """Place i of `linear` is the time 1 - i / 1000; of `sigmoid` the i-th quantile of the logit-normal from above."""
    process, notes = having("train", timestep_type="linear", min_denoising_steps=100, max_denoising_steps=700)
    assert (process.train.min_timestep, process.train.max_timestep) == (0.3, 0.9)
    assert any("times from 0.3 to 0.9 here" in note for note in notes)
    train = having("train", timestep_type="sigmoid", min_denoising_steps=500)[0].train
    assert (train.min_timestep, train.max_timestep) == (0.0, 0.5)
    train = having("train", timestep_type="sigmoid", max_denoising_steps=841.345)[0].train  # one sigma
    assert train.min_timestep == pytest.approx(1 / (1 + 2.718281828), abs=1e-5)
    assert having("train", min_denoising_steps=0, max_denoising_steps=1000)[0].train.min_timestep == 0
    assert "cannot be translated" in refused(having, "train", timestep_type="shift", min_denoising_steps=1)[0]
    assert "must be smaller" in refused(having, "train", min_denoising_steps=9, max_denoising_steps=5)[0]


def test_shift_by_its_other_names(having):
    process, notes = having("train", timestep_type="lumina2_shift")
    assert process.train.timestep_type == "shift"
    assert any("lumina2_shift: runs as shift" in note for note in notes)


def test_noise_models_have_no_timestep_type(having):
    assert having("model", arch="sdxl")[0].train.timestep_type is None


def test_losses(having):
    process, notes = having("train", loss_type="pseudo_huber")
    assert (process.train.loss_type, process.train.huber_delta) == ("huber", 0.01)
    assert any("pseudo_huber" in note for note in notes)
    assert having("train", loss_type="wavelet")[0].train.loss_type == "wavelet"
    assert "'mean_flow' is not one of mse" in refused(having, "train", loss_type="mean_flow")[0]


def test_min_snr_weights_are_for_noise_models(having):
    process, notes = having("train", min_snr_gamma=5)
    assert process.train.min_snr_gamma is None
    assert "train.min_snr_gamma: has no effect on a flow model in ai-toolkit either" in " ".join(notes)
    text = SMALL.replace("arch: zimage", "arch: sdxl").replace("lr: 1e-4", "lr: 1e-4, min_snr_gamma: 5")
    Path("job.yaml").write_text(text)
    assert load_job(Path("job.yaml")).job.config.process[0].train.min_snr_gamma == 5


def test_text_encoders_are_trained_where_they_can_be(having):
    said = "only text encoders of sd1, sd2, sdxl, ssd, vega are trained"
    assert said in refused(having, "train", train_text_encoder=True)[0]
    assert having("train", train_text_encoder=False)[0].train.train_text_encoder is False
    text = SMALL.replace("arch: zimage", "arch: sd1").replace("lr: 1e-4", "lr: 1e-4, train_text_encoder: true")
    Path("job.yaml").write_text(text)
    train = load_job(Path("job.yaml")).job.config.process[0].train
    assert (train.train_text_encoder, train.text_encoder_lr) == (True, None)


def test_differences_in_train_are_said(having):
    _, notes = having("train", gradient_accumulation=4, unload_text_encoder=True, do_differential_guidance=True)
    assert any(note.startswith("train.gradient_accumulation: 4: ai-toolkit adds the gradients up") for note in notes)
    assert any("trains without captions; Detour always uses them" in note for note in notes)
    assert any("has no effect in ai-toolkit without do_guidance_loss" in note for note in notes)
    _, notes = having("train", validation_config={"validation_items": [{"image_path": "a.png", "prompt": "a"}]})
    assert any(note.startswith("train.validation_config: no single pictures here") for note in notes)


def test_the_average_of_weights(having):
    assert having("train", ema_config={"use_ema": True})[0].train.ema_config.ema_decay == 0.999
    assert having("train", ema_config={"use_ema": False, "ema_decay": 0.9})[0].train.ema_config.use_ema is False
    assert "use_feedback" in refused(having, "train", ema_config={"use_ema": True, "use_feedback": True})[0]


def test_both_forms_of_prompts_and_flags(having):
    sample = having(
        "sample", prompts=["a cat --w 512 --h 768 --d 7 --s 4 --l 2.5 --n a dog --m 0.5", "[name], [trigger]"]
    )
    (first, second), notes = sample[0].sample.prompts, sample[1]
    assert first.model_dump(exclude_none=True) == {
        "prompt": "a cat", "neg": "a dog", "seed": 7, "width": 512, "height": 768, "guidance_scale": 2.5,
        "sample_steps": 4, "network_multiplier": 0.5,
    }  # fmt: skip
    assert second.prompt == "lena, [trigger]"
    process, notes = having(
        "sample",
        samples=[{"prompt": "a --seed 1 --gr 2", "seed": 9, "width": 256, "fps": 3, "ctrl_img": "x.png"}],
        prompts=["not used"],
    )
    assert [(prompt.prompt, prompt.seed, prompt.width) for prompt in process.sample.prompts] == [("a", 1, 256)]
    assert any("--gr 2: left out of the prompt" in note for note in notes)
    assert any("x.png: previews take no control image" in note for note in notes)
    assert "--w wants a number, found 'x'" in refused(having, "sample", prompts=["a --w x"])[0]
    assert "prompts[0].prompt" in refused(having, "sample", prompts=[5])[0]
    assert "sample.samples[0].promt" in refused(having, "sample", samples=[{"promt": "a"}])[0]


def test_a_prompts_seed_holds_for_those_after_it(having):
    """So it is there without walk_seed: `current_seed` is not set back."""
    samples = [{"prompt": "a"}, {"prompt": "b", "seed": 5}, {"prompt": "c"}]
    seeds = [prompt.seed for prompt in having("sample", samples=samples)[0].sample.prompts]
    assert seeds == [None, 5, 5]
    seeds = [prompt.seed for prompt in having("sample", samples=samples, walk_seed=True)[0].sample.prompts]
    assert seeds == [None, 5, None]


def test_previews_of_clips(having):
    """Frames and rate are taken over where a clip is asked for; pictures have none, whatever the form writes."""
    process, _ = having("sample", num_frames=33, fps=24, samples=[{"prompt": "a"}, {"prompt": "b", "num_frames": 5}])
    assert (process.sample.num_frames, process.sample.fps) == (33, 24.0)
    assert [prompt.num_frames for prompt in process.sample.prompts] == [None, 5]
    process, notes = having("sample", num_frames=1, fps=1, samples=[{"prompt": "a", "num_frames": 0}])
    assert (process.sample.num_frames, process.sample.fps, process.sample.prompts[0].num_frames) == (1, None, None)
    assert not any("frames" in note for note in notes)


def test_clips_are_taken_in_another_way(having):
    with pytest.raises(
        JobError, match=r"num_frames: 33 is not available in Detour \(clips are taken by their frame rate"
    ):
        having("datasets", num_frames=33)


def test_the_rest_of_sample(having):
    process, notes = having(
        "sample", guidance_scale=0, network_multiplier=0.8, neg=False, sample_every=0, format="jpg", sample_start_step=0
    )
    sample = process.sample
    assert (sample.guidance_scale, sample.neg, sample.sample_every) == (1.0, "", None)
    assert sample.prompts[0].network_multiplier == 0.8
    assert any("guidance_scale: 0: below 1 there is no guidance" in note for note in notes)
    assert any("sample.format: jpg: previews are PNG" in note for note in notes)
    process, notes = having("sample", prompts=[])
    assert process.sample.disable_sampling is True
    assert any("without prompts ai-toolkit draws no previews" in note for note in notes)
    assert having("train", disable_sampling=True, skip_first_sample=True)[0].sample.skip_first_sample is True


def test_logging_and_the_seed(having):
    process, _ = having("logging", use_wandb=True, project_name="p", run_name="r", log_every=7, use_ui_logger=True)
    found = process.logging
    assert (found.wandb, found.project_name, found.run_name, found.log_every) == (True, "p", "r", 7)
    process, notes = having("process", log_dir="logs", training_seed=3, performance_log_every=10, sqlite_db_path="x")
    assert (process.logging.tensorboard, process.train.seed) == (True, 3)
    assert any("TensorBoard files go into the run's folder" in note for note in notes)


# The file as a whole.


def test_names_and_folders(load):
    assert load(SMALL.replace("training_folder", "name: eva\n      training_folder")).job.config.output_name == "eva"
    assert load(SMALL).job.config.output_folder == Path("out")
    missing = refused(load, SMALL.replace("  name: lena\n", ""))
    assert missing == ["config.name: missing; it names the run and its LoRA"]


def test_several_processes(load):
    second = SMALL[SMALL.index("    - type") :]
    loaded = load(SMALL + second.replace("pictures", "others"))
    assert [str(process.datasets[0].folder_path) for process in loaded.job.config.process] == ["pictures", "others"]
    assert any("process[1]: left out of the file" in note for note in loaded.notes)
    both = refused(load, SMALL + second.replace("folder: out", "folder: elsewhere").replace("steps:", "stops:"))
    assert both == [
        "process[1].training_folder: all processes write to one folder, out",
        "process[1].train.stops: ai-toolkit has no such option; did you mean 'steps'?",
    ]


def test_other_kinds_of_job(load):
    assert refused(load, SMALL.replace("job: extension", "job: generate"))[0].startswith("job: 'generate' jobs are not")
    (mistake,) = refused(load, SMALL.replace("sd_trainer", "concept_slider"))
    assert mistake.startswith("type: 'concept_slider' is not available in Detour; allowed: diffusion_trainer")
    with pytest.raises(UserError, match=r"config\.process: expected a list, found nothing"):
        load("job: extension\nconfig: {name: a}")
    assert "config: expected a section" in refused(load, "job: extension\nconfig: 5")[0]


def test_set_uses_the_names_of_the_file(load):
    load(SMALL)
    process = load_job(Path("job.yaml"), ["train.content_or_style=style", "name=eva"])
    assert process.job.config.process[0].train.timestep_bias == "low_noise"
    assert process.job.config.output_name == "eva"
    with pytest.raises(UserError, match=r"--set train\.timestep_bias=x: .*ai-toolkit has no such option"):
        load_job(Path("job.yaml"), ["train.timestep_bias=x"])
