#!/usr/bin/env python
"""A finished checkpoint as a Hugging Face folder, and back.

    python scripts/export_hf.py outputs/530m_stage1_dense

writes the newest checkpoint of that run (or the one you name, …/checkpoint/step-16000) to the run's hf-step-N: an
ordinary Llama with its tokenizer, which `transformers` loads without remote code:

    AutoModelForCausalLM.from_pretrained("outputs/530m_stage1_dense/hf-step-16000")

The reverse checks that such a folder is the model of a flavor, and writes a checkpoint that training starts from:

    python scripts/export_hf.py --import HF_FOLDER --flavor 530m --output CHECKPOINT_FOLDER

Upstream has settings of its own for the weights alone. checkpoint.last_save_in_hf saves a run's last step as
safetensors without config, tokenizer and optimizer: such a step can be neither resumed nor exported here.
checkpoint.initial_load_in_hf starts from the safetensors of an HF_FOLDER directly. Our trainer compares its config and
its tensors with the model first (docs/model.md, continued pre-training); upstream's own does not look at the config.
"""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("float32", "bfloat16")


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    # Only now: --help should not wait for torch.
    import torch
    from torchtitan.experiments.lighthouse import hugging_face
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal

    with exit_on_refusal("export_hf"):
        hugging_face.require_transformers()
        if options.hf_folder is not None:
            hugging_face.import_folder(options.hf_folder, options.flavor, options.output, overwrite=options.overwrite)
        else:
            dtype = getattr(torch, options.dtype)
            hugging_face.export(
                options.checkpoint, options.output, dtype, options.tokenizer, options.overwrite, options.verify
            )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="a run's dump folder, or one of its checkpoint/step-N folders"
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: hf-step-N in the run's dump folder)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the exported weights (default: float32)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the run's model.hf_assets_path)")
    parser.add_argument(
        "--verify",
        choices=("digest", "size", "off"),
        default="digest",
        help="what is compared with the checkpoint's manifest: contents, sizes, or nothing (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier folder of this command")
    parser.add_argument("--import", dest="hf_folder", metavar="HF_FOLDER", type=Path, help="the folder to read back")
    parser.add_argument("--flavor", help="the flavor that HF_FOLDER must be, e.g. 530m")
    options = parser.parse_args(arguments)
    if options.hf_folder is not None:
        if options.output is None or options.flavor is None:
            parser.error("--import needs --flavor and --output")
        if options.checkpoint or options.dtype or options.tokenizer:
            parser.error("--import goes with --flavor, --output and --overwrite only")
    elif options.checkpoint is None or options.flavor is not None:
        parser.error("give a run or checkpoint to export, or --import HF_FOLDER --flavor FLAVOR --output FOLDER")
    options.dtype = options.dtype or "float32"
    return options


if __name__ == "__main__":
    main()
