"""How the weights of the trained miniature Z-Image are made: each stage one command, resumable, with its seeds fixed.

    python -m detour.nano.recipes.base    --out work/base               a base model, with guidance
    python -m detour.nano.recipes.turbo   --base work/base --out work/turbo8 --few 8
    python -m detour.nano.recipes.turbo   --base work/base --out work/turbo4 --few 4
    python -m detour.nano.recipes.figures --base work/base --turbo work/turbo8 --out work/figures

The VAE (`nano.codec`), the tokenizer and the text encoder (`nano.language`) are built, not trained. `base` and `turbo`
leave a complete model in `OUT/model`, in diffusers' layout, whenever they stop; the same command again goes on from
where it was, to the same weights as if it had never stopped. `--minutes` says when to stop.
"""
