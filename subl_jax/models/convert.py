"""Converts models between Hugging Face folders and our checkpoints, and checks that both compute the same.

    python -m subl_jax.models.convert import  HF_DIR ORBAX_DIR [--dtype=bfloat16]
    python -m subl_jax.models.convert export  ORBAX_DIR HF_DIR [--tokenizer=DIR]
    python -m subl_jax.models.convert export  ADAPTERS PEFT_DIR --base=HF_DIR   (or --base=ORBAX_DIR --merge)
    python -m subl_jax.models.convert check   HF_DIR [--dtype=float32] [--out=FILE]

Folders are local; nothing is downloaded, unpickled, or run from them. A checkpoint made by `import` holds the
tokenizer's files under ORBAX_DIR/tokenizer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer"  # the folder in a checkpoint that `import` makes

_EPILOG = """\
a model's way through:
  hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir qwen      (any local folder with safetensors will do)
  python -m subl_jax.models.convert check qwen                 same logits and tokens as transformers? (needs torch)
  python -m subl_jax.models.convert import qwen qwen.orbax     then train or evaluate qwen.orbax
  python -m subl_jax.models.convert export qwen.orbax out      then AutoModelForCausalLM.from_pretrained("out")
"""


# --- Commands ---------------------------------------------------------------------------------------------------------


def import_command(args: argparse.Namespace) -> int:
    """Hugging Face folder -> Orbax checkpoint with its tokenizer."""
    _on_host()
    import jax

    from subl_jax import artifacts, checkpoint
    from subl_jax.chat import tokenizer as tokenizers
    from subl_jax.models import hf_export, hf_import
    from subl_jax.models.families import HuggingFaceError, family_of

    folder = hf_import.open_folder(args.hf_dir)
    hf_import.read_config(args.hf_dir)  # before the tokenizer, whose reader looks into config.json too
    tokenizer = hf_export.load_tokenizer(args.tokenizer or args.hf_dir)
    config = hf_import.read_config(args.hf_dir, tokenizer)
    dtype = args.dtype or folder.dtype
    target = Path(args.orbax_dir)
    raw = json.loads((Path(args.hf_dir) / hf_import.CONFIG).read_text(encoding="utf-8"))
    metadata = {
        "model": config.architecture(),
        "tokenizer": tokenizers.fingerprint(tokenizer),
        "source": {
            "folder": str(Path(args.hf_dir).absolute()),
            "architecture": family_of(config).architecture,
            "max_position_embeddings": raw.get("max_position_embeddings"),
            "dtype": dtype,
        },
    }
    try:
        # Entered before anything is read: a directory that is taken is refused at once.
        with artifacts.atomic_directory(target, overwrite=args.overwrite) as partial:
            peak, start = PeakAnonymous(), time.perf_counter()
            with (
                peak,
                _megabytes("import", folder.nbytes) as report,
            ):
                params = hf_import.import_params(folder, config, dtype=dtype, report=report)
            seconds = time.perf_counter() - start
            checkpoint.save_model(partial, params, metadata)
            hf_export.copy_tokenizer(args.tokenizer or args.hf_dir, partial / TOKENIZER)
    except FileExistsError as error:
        raise HuggingFaceError(f"{error} (or say --overwrite)") from error
    except OSError as error:
        raise HuggingFaceError(f"cannot write {target}: {artifacts.reason(error)}") from error
    leaves = jax.tree.leaves(params)
    total, largest = sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves)
    print(f"parameters              {sum(leaf.size for leaf in leaves):,} in {dtype}, {total / 1e9:.3f} GB")
    print(f"read                    {seconds:.2f} s, {total / 1e9 / seconds:.2f} GB/s")
    if peak.bytes is None:
        print("peak anonymous memory   not measured: /proc/self/status has no RssAnon here")
    else:
        print(
            f"peak anonymous memory   {peak.bytes / 1e9:.3f} GB above the start; bound {(total + largest) / 1e9:.3f} GB "
            f"(parameters and the largest stacked shard, {largest / 1e9:.3f} GB)"
        )
    print(f"checkpoint              {target}")
    return 0


def export_command(args: argparse.Namespace) -> int:
    """Orbax checkpoint -> Hugging Face folder; adapters -> a folder of PEFT, or merged into their base."""
    _on_host()
    import jax

    from subl_jax import checkpoint
    from subl_jax.chat import tokenizer as tokenizers
    from subl_jax.models import hf_export, lora, peft_format
    from subl_jax.models.config import ModelConfig
    from subl_jax.models.families import HuggingFaceError, family_of

    metadata = checkpoint.read_metadata(args.orbax_dir)
    if "model" not in metadata:
        raise HuggingFaceError(
            f"{args.orbax_dir} does not say what model it holds (no 'model' in its metadata); "
            "name a checkpoint of parameters, not of a training run"
        )
    config = ModelConfig.from_dict(metadata["model"])
    adapters = bool(metadata.get("lora"))
    if adapters != bool(args.base) or (args.merge and not adapters):
        raise HuggingFaceError(
            f"{args.orbax_dir} holds {'adapters: name the model below them' if adapters else 'a whole model: leave out'} "
            f"{'with --base (its Hugging Face folder; with --merge also its checkpoint)' if adapters else '--base and --merge'}"
        )
    if adapters and not args.merge:
        peft_format.export_adapters(args.orbax_dir, args.base, args.hf_dir, dtype=args.dtype, overwrite=args.overwrite)
        print(f"adapters written to {args.hf_dir} in PEFT's format, on {args.base}")
        if config.tie_embeddings and "head" in metadata["lora"]["targets"]:
            print(
                "the head has an adapter and is tied to the embedding: PEFT runs it as trained, but would merge it into both; "
                "for a merged model export with --merge"
            )
        return 0
    source = Path(args.tokenizer) if args.tokenizer else Path(args.orbax_dir) / TOKENIZER
    found = tokenizers.fingerprint(hf_export.load_tokenizer(source, config.vocab_size))
    if metadata.get("tokenizer") not in (None, found):
        raise HuggingFaceError(
            f"the tokenizer in {source} has fingerprint {found}, the checkpoint was made with {metadata['tokenizer']}; "
            "name the folder of that tokenizer with --tokenizer"
        )
    longest = args.max_position_embeddings or (metadata.get("source") or {}).get("max_position_embeddings")
    if adapters:
        tied = config.tie_embeddings
        config, params = lora.merge_checkpoint(args.orbax_dir, args.base)
        if config.tie_embeddings != tied:
            print("the head had an adapter: it is written as a matrix of its own, no longer tied to the embedding")
    else:
        params, _ = checkpoint.load_model(args.orbax_dir)
    with _megabytes("export", sum(leaf.nbytes for leaf in jax.tree.leaves(params))) as report:
        hf_export.export_folder(
            args.hf_dir, config, params, tokenizer=source, dtype=args.dtype, max_shard_bytes=args.max_shard_bytes,
            max_position_embeddings=longest or hf_export.MAX_POSITION_EMBEDDINGS, overwrite=args.overwrite,
            report=report,
        )  # fmt: skip
    print(f"{family_of(config).architecture} written to {args.hf_dir}")
    return 0


def check_command(args: argparse.Namespace) -> int:
    """Our logits and greedy tokens against transformers on torch; 1 beyond the bars."""
    from subl_jax import artifacts
    from subl_jax.models import hf_check

    found = hf_check.compare(args.dir, args.dtype)
    print(f"{'tokens':>6}  {'max |logit difference|':>22}  {'max KL (nats)':>13}  same greedy tokens")
    for row in found.rows:
        print(
            f"{row.length:>6}  {row.max_abs_diff:>22.2e}  {row.max_kl:>13.2e}  {row.greedy_tokens} of {hf_check.STEPS}"
        )
    kl = hf_check.MAX_KL[args.dtype]
    exact = f", difference at most {hf_check.MAX_ABS_DIFF:g}, all tokens the same" if args.dtype == "float32" else ""
    print(f"{'within' if found.passed else 'BEYOND'} the bars of {args.dtype}: KL at most {kl:g}{exact}")
    figures = {"max_abs_diff": found.max_abs_diff, "max_kl": found.max_kl, "greedy_equal": found.greedy_equal}
    if args.out:
        rows = [dataclasses.asdict(row) for row in found.rows]
        artifacts.write_json_atomic(args.out, {**figures, "passed": found.passed, "dtype": args.dtype, "rows": rows})
    print(json.dumps(figures))
    return 0 if found.passed else 1


# --- What the commands share ------------------------------------------------------------------------------------------


def _on_host() -> None:
    """Keeps a conversion off the accelerators: a model that fits the host need not fit one of them."""
    import jax

    jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def _megabytes(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in whole MB, and the function that takes bytes."""
    from subl_jax.metrics.progress import progress

    done = 0
    with progress(-(-total // 10**6), description, unit="MB") as shown:

        def report(count: int) -> None:
            nonlocal done
            done += count
            if done // 10**6 > shown.count:
                shown.advance(done // 10**6 - shown.count)

        yield report
        shown.advance(-(-done // 10**6) - shown.count)


class PeakAnonymous:
    """The highest anonymous memory of this process inside a `with` block, above what it was at the start.

    Pages of mapped files do not count: the kernel takes them back when it needs them.

    Attributes:
      bytes: the peak; None where the kernel does not tell.
    """

    bytes: int | None = None

    def __enter__(self) -> PeakAnonymous:
        """Starts a thread that looks every 5 ms."""
        self._start = _anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._start is not None:
            self.bytes = 0
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._look()

    def _look(self) -> None:
        now = _anonymous_bytes()
        if now is not None and self._start is not None and self.bytes is not None:
            self.bytes = max(self.bytes, now - self._start)

    def __exit__(self, *_: object) -> None:
        """Stops the thread."""
        self._stop.set()
        if self.bytes is not None:
            self._thread.join()
            self._look()


def _anonymous_bytes() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return None


# --- The command line -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="python -m subl_jax.models.convert", description=(__doc__ or "").split("\n")[0], epilog=_EPILOG,
        formatter_class=kind,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="{import,export,check}", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=kind)
        made.set_defaults(run=run)
        return made

    dtypes = ("float32", "bfloat16")
    made = command("import", import_command, "a Hugging Face folder (safetensors) becomes an Orbax checkpoint")
    made.add_argument("hf_dir", help="folder with config.json, safetensors (one file, or an index and its shards)")
    made.add_argument("orbax_dir", help="the checkpoint to make; appears complete or not at all")
    made.add_argument("--dtype", choices=dtypes, help="of the weights; default: that of the files (float16: float32)")
    made.add_argument("--tokenizer", help="folder of the tokenizer; default: HF_DIR")
    made.add_argument("--overwrite", action="store_true", help="replace an older checkpoint")

    made = command("export", export_command, "an Orbax checkpoint becomes a folder that transformers loads")
    made.add_argument("orbax_dir", help="a checkpoint of a model, made by import or by training")
    made.add_argument("hf_dir", help="the folder to make; appears complete or not at all")
    made.add_argument("--tokenizer", help=f"folder of the tokenizer; default: ORBAX_DIR/{TOKENIZER}")
    made.add_argument("--base", help="for a checkpoint of adapters: the model that they were trained on")
    made.add_argument("--merge", action="store_true", help="add the adapters into --base and write a whole model")
    made.add_argument("--dtype", choices=dtypes, help="of the weights; default: that of the checkpoint")
    made.add_argument("--max_shard_bytes", type=int, default=5 * 10**9, help="size of a file; default %(default)s")
    made.add_argument(
        "--max_position_embeddings", type=int,
        help="longest context in tokens, for servers; default: that of the imported folder, else 4096",
    )  # fmt: skip
    made.add_argument("--overwrite", action="store_true", help="replace an older folder")

    made = command(
        "check", check_command, "our logits and 64 greedy tokens against transformers on torch, on fixed random ids"
    )
    made.add_argument("dir", help="a Hugging Face folder")
    made.add_argument("--dtype", choices=dtypes, default="float32", help="of both models; default %(default)s")
    made.add_argument("--out", help="also write the figures as JSON to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; an expected failure is one line on standard error and exit code 1."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        # The errors of this project say what is wrong and what to do; a traceback adds nothing for the user.
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
