"""Every option of ai-toolkit's job files (read from its sources at 27a03a91, August 2026), and what becomes of each.

`read`: translated in `aitoolkit.py`. `silent`: nothing here depends on it. `noted`: cannot be honoured, the training
stays the same, so it is listed. `refused`: would change what is trained, so it is an error while it is switched on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["read", "silent", "noted", "refused"]


@dataclass(frozen=True)
class Rule:
    """What becomes of one option. `fine`: the values at which it asks for nothing; without any, all empty ones."""

    kind: Kind
    why: str = ""
    fine: tuple[Any, ...] = ()

    def asks_nothing(self, value: object) -> bool:
        """Whether the option is left at a value that needs nothing."""
        if value is None or self.kind in ("read", "silent"):
            return True
        return value in self.fine if self.fine else not value


Rules = dict[str, Rule]


def _read(names: str) -> Rules:
    return dict.fromkeys(names.split(), Rule("read"))


def _silent(names: str) -> Rules:
    return dict.fromkeys(names.split(), Rule("silent"))


def _noted(names: str, why: str, *fine: object) -> Rules:
    return dict.fromkeys(names.split(), Rule("noted", why, fine))


def _refused(names: str, why: str, *fine: object) -> Rules:
    return dict.fromkeys(names.split(), Rule("refused", why, fine))


TOP = _read("job config meta")

CONFIG = _read("name process") | _silent("device")

PROCESS = (
    _read(
        "type name training_folder device trigger_word network save datasets train logging model sample training_seed"
        " log_dir"
    )
    | _silent("performance_log_every sqlite_db_path lorm_extract_mode lorm_extract_mode_param")
    | _noted("torch_profiler", "there is no profiler")
    | _noted("first_sample", "the first preview is drawn like the others")
    | _refused("adapter embedding decorator slider guidance do_lorm", "Detour trains LoRAs and whole denoisers")
)

MODEL = (
    _read(
        "name_or_path extras_name_or_path arch assistant_lora_path quantize quantize_te qtype qtype_te low_vram"
        " layer_offloading auto_memory is_v2 is_v3 is_xl is_pixart is_pixart_sigma is_auraflow is_flux is_lumina2"
        " is_ssd is_vega model_kwargs"
    )
    | _silent(
        "dtype layer_offloading_transformer_percent layer_offloading_text_encoder_percent refiner_start_at"
        " block_compile compile_mode compile_fullgraph compile_dynamic cache_size_limit latent_space_version"
        " ignore_if_contains only_if_contains experimental_xl split_model_other_module_param_count_scale"
    )
    | _noted("compile", "blocks are not compiled; steps take longer, the result is the same")
    | _noted("split_model_over_gpus", "the model stays on one device")
    | _noted("vae_device te_device", "Detour decides where parts of the model live")
    | _noted("vae_dtype te_dtype", "Detour decides the type of VAE and text encoder")
    | _noted("quantize_kwargs", "the architecture decides which layers stay unquantised")
    | _noted("text_encoder_bits", "use quantize_te", 16)
    | _refused("vae_path te_name_or_path unet_path unet_sample_size model_paths", "parts come from extras_name_or_path")
    | _refused("refiner_name_or_path", "there are no refiners")
    | _refused("lora_path inference_lora_path unconditional_lora_path", "the only other LoRA is assistant_lora_path")
    | _refused("accuracy_recovery_adapter", "there are no accuracy recovery adapters")
    | _refused("in_context attn_masking use_flux_cfg is_v_pred", "the architecture has no such switch")
    | _refused("use_text_encoder_1 use_text_encoder_2", "every text encoder is used", True)
)

# Of flex2.
MODEL_KWARGS = _read(
    "invert_inpaint_mask_chance inpaint_dropout control_dropout do_random_inpainting random_blur_mask"
    " random_dialate_mask"
) | _noted("inpaint_random_chance", "every hole is drawn at random")

NETWORK = (
    _read(
        "type linear rank linear_alpha alpha conv dropout network_kwargs transformer_only lokr_full_rank lokr_factor"
        " pretrained_lora_path"
    )
    | _silent("conv_alpha split_multistage_loras")
    | _noted("old_lokr_format", "LoKr files are written with today's names")
    | _noted("layer_offloading", "the trained network stays on the card")
    | _refused("lorm all_layers", "only LoRA, LoKr and DoRA of linear layers exist")
)

NETWORK_KWARGS = _read("ignore_if_contains only_if_contains") | _refused(
    "full_if_contains rank_dropout module_dropout parameter_threshold attn_only full_train_in_out target_lin_modules"
    " target_conv_modules use_bias block_dims block_alphas conv_block_dims conv_block_alphas",
    "only include, exclude and dropout exist",
)

SAVE = (
    _read("dtype save_every max_step_saves_to_keep")
    | _silent("save_format hf_repo_id hf_private")
    | _noted("push_to_hub", "nothing is uploaded; upload the file yourself")
)

_CONTROL = "no architecture takes such pictures"
_CLIPS = "clips are taken by their frame rate here: write num_frames, fps and clip_part in Detour's own layout"
_PIXELS = "pictures are trained as they are; edit the files instead"

DATASET = (
    _read(
        "folder_path dataset_path default_caption caption_ext caption_type caption_dropout_rate trigger_word resolution"
        " num_repeats is_reg flip_x flip_y random_crop mask_path mask_min_value alpha_mask loss_multiplier"
        " shuffle_tokens keep_tokens num_workers batch_size control_path"
    )
    | _silent(
        "cache_latents cache_latents_to_disk cache_tensors_to_disk cache_clip_vision_to_disk cache_text_embeddings"
        " load_image_when_caching_latents prefetch_factor cache_latents_num_workers fast_image_size debug"
        " bucket_tolerance random_triggers_max replay_transforms shrink_video_to_frames fps auto_frame_count"
        " trim_auto_frame_count_tail shuffle_augmentations clip_image_shuffle_augmentations full_size_control_images"
        " control_transparent_color num_controls_from_same_folder guidance_type audio_preserve_pitch audio_normalize"
        " diff_output_preservation_class"
    )
    | _noted("buckets", "pictures keep their shape (buckets are always on)", True)
    | _refused("network_weight", "the LoRA always trains at full strength; loss_multiplier weighs a dataset", 1)
    | _refused("type", "a dataset is a folder of pictures with captions", "image", "sd")
    | _refused("scale", "use resolution", 1)
    | _refused("num_frames", _CLIPS, 0, 1)
    | _refused("do_i2v do_audio", "models of video are trained from a caption alone, without sound")
    | _refused("prior_reg diff_output_preservation", "the base model's own prediction is not a target yet")
    | _refused("token_dropout_rate random_triggers replacements", "use caption_dropout_rate, shuffle_tokens, or edit")
    | _refused("use_short_captions", "write the captions that you want into the caption files")
    | _refused("random_scale square_crop poi", "use random_crop or resolution")
    | _refused("augments augmentations standardize_images extra_values clip_image_augmentations", _PIXELS)
    | _refused("invert_mask", "invert the mask files (white counts)")
    | _refused("control_path_1 control_path_2 control_path_3 control_from_same_folder", "one control_path is read")
    | _refused("controls", "make control pictures beforehand and name their folder in control_path")
    | _refused("inpaint_path", "holes are drawn at random (controls.inpaint)")
    | _refused("unconditional_path clip_image_path clip_image_from_same_folder", _CONTROL)
)

_PRIOR = "the base model's own prediction is not a target yet"
_NOISE = "the noise is plain Gaussian noise"
_LOSS = "the losses are mse, mae, huber and wavelet"
_CFG = "training runs without guidance"

TRAIN = (
    _read(
        "batch_size steps lr gradient_accumulation optimizer optimizer_params lr_scheduler lr_scheduler_params"
        " max_grad_norm dtype noise_scheduler timestep_type content_or_style min_denoising_steps max_denoising_steps"
        " loss_type reg_weight ema_config gradient_checkpointing unload_text_encoder skip_first_sample"
        " train_text_encoder"
        " disable_sampling validation_config do_differential_guidance do_guidance_loss min_snr_gamma"
        " bypass_guidance_embedding"
    )
    | _silent(
        "cache_text_embeddings train_refiner sdp xformers text_encoder_lr refiner_lr embedding_lr adapter_lr"
        " diff_output_preservation_multiplier diff_output_preservation_class blank_prompt_preservation_multiplier"
        " inverted_mask_prior_multiplier guidance_loss_target guidance_loss_schedule do_guidance_loss_cfg_zero"
        " unconditional_prompt differential_guidance_scale merge_network_on_save_strength batch_noise_correction_scale"
        " signal_amplification_strength signal_correction_noise_scale paramiter_swapping_factor"
        " do_fft_velocity_equiv_weight correct_pred_norm_multiplier target_norm_std_value latent_feature_loss_weight"
        " diffusion_feature_extractor_weight switch_boundary_every audio_loss_multiplier max_negative_prompts"
        " adapter_assist_type show_turbo_outputs"
    )
    | _noted("unet_lr", "a network trains with train.lr alone, in ai-toolkit too")
    | _noted("content_or_style_reg", "has no effect in ai-toolkit either")
    | _noted("force_first_sample", "the first preview is drawn when a run starts, not when it goes on")
    | _noted("attention_backend", "Detour chooses the attention kernel", "native")
    | _noted("max_loss_debug", "losses are in events.jsonl")
    | _noted("cfg_scale max_cfg_scale cfg_rescale", _CFG, 1)
    | _refused("gradient_accumulation_steps", "use train.gradient_accumulation", 1)
    | _refused("train_unet", "Detour trains the denoiser", True)
    | _refused("train_turbo", "a distilled model trains with a training adapter (model.assistant_lora_path)")
    | _refused("start_step", "a run goes on by itself from its newest checkpoint")
    | _refused("merge_network_on_save do_paramiter_swapping weight_jitter free_u", "trained weights are left alone")
    | _refused("diff_output_preservation blank_prompt_preservation inverted_mask_prior do_prior_divergence", _PRIOR)
    | _refused("do_blank_stabilization", _PRIOR)
    | _refused("linear_timesteps linear_timesteps2", "use timestep_type: weighted")
    | _refused("num_train_timesteps", "times are continuous", 1000)
    | _refused("next_sample_timesteps", "next_sample takes 8 steps", 8)
    | _refused("snr_gamma learnable_snr_gos max_loss target_norm_std", _LOSS)
    | _refused("t0_loss_target t0_velocity_equiv_weight do_fft_loss correct_pred_norm", _LOSS)
    | _refused("loss_target", _LOSS, "noise")
    | _refused("latent_feature_extractor_path diffusion_feature_extractor_path", _LOSS)
    | _refused("pred_scaler", _LOSS, 1)
    | _refused(
        "noise_offset random_noise_multiplier random_noise_shift dynamic_noise_offset blended_blur_noise", _NOISE
    )
    | _refused("do_signal_correction_noise do_batch_noise_correction do_signal_amplification match_noise_norm", _NOISE)
    | _refused("force_consistent_noise", _NOISE)
    | _refused("noise_multiplier target_noise_multiplier optimal_noise_pairing_samples", _NOISE, 1)
    | _refused("img_multiplier noisy_latent_multiplier latent_multiplier", "latents are left alone", 1)
    | _refused("standardize_images standardize_latents adaptive_scaling_factor", "latents are left alone")
    | _refused("do_cfg do_random_cfg negative_prompt", _CFG)
    | _refused("prompt_dropout_prob prompt_saturation_chance", "use caption_dropout_rate of the datasets")
    | _refused("short_and_long_captions short_and_long_captions_encoder_split", "give several captions a picture")
    | _refused("single_item_batching", "use gradient_accumulation")
    | _refused("adapter_assist_name_or_path match_adapter_assist match_adapter_chance", "there are no control adapters")
)

EMA = (
    _read("use_ema ema_decay")
    | _refused("use_feedback", "the average follows the weights")
    | _refused("param_multiplier", "the average follows the weights", 1)
)

VALIDATION = _read("validation_items resolution validate_every_n_steps validation_sigmas")

SCHEDULER = (
    _read("num_warmup_steps eta_min factor start_factor end_factor")
    | _silent("total_iters")
    | _refused(
        "T_max T_0 T_mult last_epoch max_iterations step_size gamma milestones num_training_steps num_cycles power"
        " lr_end",
        "the schedule spans the whole run",
    )
)

LOGGING = (
    _read("log_every use_wandb project_name run_name")
    | _silent("use_ui_logger")
    | _noted("verbose", "everything is in events.jsonl")
)

SAMPLE = (
    _read(
        "sampler sample_every width height neg seed walk_seed guidance_scale sample_steps network_multiplier prompts"
        " samples num_frames fps"
    )
    | _silent("refiner_start_at adapter_conditioning_scale")
    | _noted("sample_start_step", "previews begin with the run")
    | _noted("format", "previews are PNG, with how they were drawn in their text", "png")
    | _noted("guidance_rescale extra_values do_cfg_norm", "previews use plain guidance")
)

SAMPLE_ITEM = (
    _read("prompt width height neg seed guidance_scale sample_steps network_multiplier ctrl_img num_frames")
    | _silent("fps ctrl_idx")
    | _noted("ctrl_img_1 ctrl_img_2 ctrl_img_3", "previews take one control image")
    | _noted("do_cfg_norm", "previews use plain guidance")
)

# Options of ai-toolkit's inline flags in prompts (`a cat --w 512 --d 7`) -> option here, and how to read the value.
PROMPT_FLAGS: dict[str, tuple[str, type]] = {
    "w": ("width", int), "h": ("height", int), "d": ("seed", int), "seed": ("seed", int), "n": ("neg", str),
    "l": ("guidance_scale", float), "cfg": ("guidance_scale", float), "s": ("sample_steps", int),
    "steps": ("sample_steps", int), "m": ("network_multiplier", float),
    "network_multiplier": ("network_multiplier", float), "ctrl_img": ("ctrl_img", str), "ctrl_idx": ("ctrl_idx", int),
}  # fmt: skip

# type -> ours
DTYPES = {
    "float": "fp32", "fp32": "fp32", "single": "fp32", "float32": "fp32",
    "fp16": "fp16", "half": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16",
}  # fmt: skip

# name -> (ours, what is different)
OPTIMIZERS: dict[str, tuple[str, str]] = {
    "adamw": ("adamw", ""),
    "adamw8bit": ("adamw8bit", ""),
    "adamw8": ("adamw8bit", "runs as adamw8bit of bitsandbytes"),
    "adam": ("adamw", "runs as adamw, which is the same without weight decay"),
    "adam8bit": ("adamw8bit", "runs as adamw8bit, which is the same without weight decay"),
    "adam8": ("adamw8bit", "runs as adamw8bit, which is the same without weight decay"),
    "adafactor": ("adafactor", ""),
    "prodigy": ("prodigy", ""),
    "prodigyopt": ("prodigy", ""),
    "prodigy8bit": ("prodigy", "runs as prodigy, with its state in 32 bits (more memory)"),
    "lion": ("lion", ""),
    "lion8bit": ("lion", "runs as lion, with its state in 32 bits (more memory)"),
}

PROCESS_TYPES = ("diffusion_trainer", "sd_trainer", "ui_trainer")
OTHER_PROCESS_TYPES = (
    "concept_slider", "concept_replacer", "textual_inversion_trainer", "image_reference_slider_trainer",
    "ultimate_slider_trainer", "dataset_tools", "sync_from_collection", "super_tagger", "reference_generator",
    "pure_lora_generator", "batch_img2img", "AceStepCaptioner", "Qwen3VLCaptioner", "Qwen3OmniCaptioner",
    "Ideogram4Captioner",
)  # fmt: skip

# Legacy flags of model -> arch, in ai-toolkit's order.
ARCH_FLAGS = {
    "is_v2": "sd2", "is_v3": "sd3", "is_xl": "sdxl", "is_pixart_sigma": "pixart_sigma", "is_pixart": "pixart",
    "is_auraflow": "auraflow", "is_flux": "flux", "is_lumina2": "lumina2", "is_ssd": "ssd", "is_vega": "vega",
}  # fmt: skip

# Architectures that are told of control pictures, and those trained with their embedding of guidance left out.
CONTROLLED = ("flex2",)
BYPASSED = ("flex1", "flex2")

# Architectures with a UNet, for which ai-toolkit honours alpha and adapts convolutions; also pixart and auraflow keep
# alpha there (their legacy class does not call itself a transformer).
UNETS = ("sd1", "sd2", "sdxl", "ssd", "vega")
ALPHA_COUNTS = (*UNETS, "pixart", "pixart_sigma", "auraflow")
