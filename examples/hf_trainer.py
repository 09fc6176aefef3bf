"""Both stages of Lighthouse in Hugging Face's ``Trainer``: a small model on the standard library's bytes, or a file's.

    pip install -e ".[hf]"   # transformers, and accelerate for its Trainer
    python examples/hf_trainer.py
    python examples/hf_trainer.py --context 32768 --top-k 1024 --width 1024 --layers 16 --lr 1e-3 --steps 200 100

The second is for a GPU; on a CPU that others use too, set OMP_WAIT_POLICY=passive.

Both stages are one training run, with one optimizer, one schedule and one pass over the data: a callback switches the
model to dense attention where Stage 2 begins. What comes out is an ordinary Llama, or with ``--family Qwen3`` another,
which ``--save FOLDER`` writes. The first two and the last two layers stay dense, where there are others; ``--through``
names those that go through Lighthouse. ``--steps 0 100`` is the dense model alone, for comparison. The loss of Stage 1
is not comparable with a dense one (README.md, Limits).
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lighthouse import LighthouseConfig
from lighthouse.integrations.transformers import register


class Stage2(TrainerCallback):
    """Dense attention from a step on.

    Asked before every step, so that a run resumed from a checkpoint is in the right stage too: how a model attends is
    not saved with it.
    """

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        model.set_attn_implementation("lighthouse" if state.global_step < self.after else "sdpa")


def examples_of(files: list[Path], context: int) -> list[dict[str, torch.Tensor]]:
    """Examples of exactly ``context`` bytes.

    Lighthouse takes whole sequences and refuses padding. So the text is cut every ``context`` bytes and what is left
    over at its end is dropped; an example has no attention mask, and the default collator only stacks. Documents run on
    into each other, without ``position_ids`` that start anew, which would mark them as packed: that is refused too.
    """
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    rows = text[: len(text) // context * context].view(-1, context).long()
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="any file; default: the modules of the standard library")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step and device")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs=2, default=[24, 12], metavar=("STAGE1", "STAGE2"))
    parser.add_argument("--family", default="Llama", help="Llama, Qwen2, Qwen3 … (docs/hugging_face.md)")
    parser.add_argument("--through", help="layers through Lighthouse, such as 2--3; default: as said above")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--save", type=Path, help="where the trained model goes; default: nowhere")
    args = parser.parse_args()

    # The geometry belongs to this process, not to the model: nothing of it is saved.
    geometry = LighthouseConfig(top_k=args.top_k)
    geometry.validate(args.context)
    register(geometry, layers=args.through)

    files = [args.text] if args.text else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        args.family.lower(),
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=max(1, args.width // 64),
        head_dim=32,
        max_position_embeddings=args.context,
        initializer_range=args.width**-0.5,  # the default suits widths in the thousands
        # All 256 tokens are bytes: Llama's defaults would make special ones of 1 and 2.
        bos_token_id=None,
        eos_token_id=None,
        # A cache of keys and values serves decoding; in training it would hold every layer's for nothing. ``Trainer``
        # turns it off by itself, a loop of your own does not.
        use_cache=False,
        attn_implementation="lighthouse",
    )
    model = AutoModelForCausalLM.from_config(config)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=sum(args.steps),
                per_device_train_batch_size=args.batch,
                learning_rate=args.lr,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=4,
                bf16=torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=examples_of(files, args.context),
            callbacks=[Stage2(after=args.steps[0])],
        )
        trainer.train()
    if args.save:
        model.save_pretrained(args.save)

    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    stages = {"stage 1, Lighthouse": losses[: args.steps[0]], "stage 2, dense": losses[args.steps[0] :]}
    for stage, own in stages.items():
        if not own:
            continue
        last = own[-4:]
        print(f"{stage}: {len(own)} steps, loss {own[0]:.3f}, over its last {len(last)} {sum(last) / len(last):.3f}")


if __name__ == "__main__":
    main()
