"""`shardproof generate`: continue prompts with a language model, the same text at every degree."""

import codecs
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from shardproof import files
from shardproof.axis import Axis
from shardproof.checkpoint.load import load, read_state
from shardproof.checkpoint.series import checkpoints_of
from shardproof.checkpoint.together import together
from shardproof.cli.options import (
    HELP_OPTIONS,
    Number,
    is_written,
    json_option,
    leaves_option,
    number_option,
    seed_option,
)
from shardproof.cli.output import ReaderLeftError, console
from shardproof.cli.output_file import OutputFile
from shardproof.cli.ranks_here import check_ranks, is_speaker, ranks_options, run_on_ranks
from shardproof.errors import UsageError
from shardproof.hf.generation import KeyedSampling, read_generation_config
from shardproof.hf.skeleton import language_config, require_transformers, skeleton
from shardproof.hf.tokenizer import read_tokenizer
from shardproof.hf.weights import CONFIG, checked_directory
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.prover.report import counted
from shardproof.scheme import Scheme
from shardproof.text_batches import NUM_BYTES, tokens_of_text
from shardproof.wording import few, short_repr, short_text

DEFAULT_TOKENS = 64
_NO_READER = "nobody reads it"
_LARGEST_PROMPTS = 1 << 26  # bytes
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a generation config


@dataclass(frozen=True)
class GenerationRun:
    """What every rank gets.

    Attributes:
        model: the directory.
        prompts: the texts to continue.
        num_tokens: new tokens of each, at most.
        temperature: of the softmax; None chooses the most likely token.
        top_k: the number of tokens that may be drawn; None: all.
        seed: of the draws.
        scheme: of the cut model.
    """

    model: Path
    prompts: tuple[str, ...]
    num_tokens: int
    temperature: float | None
    top_k: int | None
    seed: int
    scheme: Scheme


@dataclass(frozen=True)
class GeneratedText:
    """A prompt and what followed.

    Attributes:
        prompt: as it was written.
        text: the new text.
        tokens: the new tokens.
        seconds: that they took.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    seconds: float


@click.command(context_settings=HELP_OPTIONS)
@click.option(
    "--model",
    metavar="DIR",
    required=True,
    help="A directory with config.json and safetensors, such as a checkpoint.",
)
@click.option("--prompt", "texts", metavar="TEXT", multiple=True, help="May be given again.")
@click.option("--prompts", "prompts_file", metavar="FILE", help="A prompt on each line.")
@ranks_options
@number_option(
    "--tokens",
    example=DEFAULT_TOKENS,
    default=DEFAULT_TOKENS,
    show_default=True,
    help="New tokens of each prompt, at most.",
)
@click.option(
    "--temperature",
    type=Number(0.8),
    metavar="X",
    help="Draw tokens, by --seed.  [default: the most likely token]",
)
@number_option("--top-k", example=40, help="Draw among so many; needs --temperature.")
@leaves_option
@seed_option
@json_option("prompts, texts and tokens")
def generate(
    *,
    model: str,
    texts: tuple[str, ...],
    prompts_file: str | None,
    degree: int | None,
    engine: str | None,
    threads: int | None,
    timeout: float | None,
    tokens: int,
    temperature: float | None,
    top_k: int | None,
    leaves: int,
    seed: int,
    json_file: OutputFile | None,
) -> int:
    """Continue prompts with a causal language model, with the same text at every degree.

    The text is printed as it comes. Without a tokenizer in the directory, a token is a byte. Under
    torchrun, the ranks are torchrun's.
    """
    require_transformers("shardproof generate")
    if top_k is not None and temperature is None:
        raise UsageError(f"--top-k {top_k} needs --temperature, without which nothing is drawn.")
    prompts = _prompts(texts, prompts_file)
    folder = _folder(model)
    saved = read_state(folder)
    if not is_written("leaves") and saved is not None:
        leaves = saved.leaves or leaves  # of the checkpoint: the bits of its training
    check_ranks(degree, engine, threads, leaves)
    _check(folder, prompts, tokens)
    run = GenerationRun(folder, prompts, tokens, temperature, top_k, seed, Scheme(leaves=leaves))
    work = functools.partial(_work, run=run)
    results, num_ranks, failure = run_on_ranks(work, degree, engine, threads, timeout)
    if not is_speaker():
        return 0
    if json_file is not None:
        json_file.write({"degree": num_ranks, "texts": [vars(each).copy() for each in results]})
    if failure == _NO_READER:
        raise ReaderLeftError
    if failure:
        raise UsageError(f"standard output cannot be written: {failure}. Send it elsewhere.")
    count, seconds = sum(len(each.tokens) for each in results), sum(r.seconds for r in results)
    console(stderr=True).whole_line(
        f"{count} tokens in {seconds:.2f} s on {counted(num_ranks, 'rank')}: "
        f"{count / max(seconds, 1e-9):,.1f} tokens/s"
    )
    return 0


def _folder(model: str) -> Path:
    """The directory of --model, as an absolute path.

    Raises:
        UsageError: it has no config.json.
    """
    path = files.path_of(model, what="--model", way_out="Name a directory with config.json.")
    is_above = path.is_dir() and not (path / CONFIG).exists()
    names = sorted(each.name for each in checkpoints_of(path).values()) if is_above else []
    if names:
        raise UsageError(
            f"--model {short_text(model)} has checkpoints ({few(names, most=3)}) and no {CONFIG}. "
            f"Name one of them, such as --model {short_text(str(path / names[-1]))}."
        )
    return checked_directory(model).absolute()


def _prompts(texts: tuple[str, ...], prompts_file: str | None) -> tuple[str, ...]:
    """All prompts.

    Raises:
        UsageError: there is none, one is empty, or the file cannot be read.
    """
    prompts = list(texts)
    if prompts_file is not None:
        what, way_out = f"--prompts {short_text(prompts_file)}", "Name a text file."
        path = files.path_of(prompts_file, what="--prompts", way_out=way_out)
        content = files.read_bytes(path, what=what, way_out=way_out, largest=_LARGEST_PROMPTS)
        try:
            lines = content.decode("utf-8-sig").split("\n")
            prompts += [line.rstrip("\r") for line in lines if line.strip()]
        except UnicodeDecodeError:
            raise UsageError(f"{what} is not UTF-8. {way_out}") from None
    if prompts_file is None and not texts:
        raise UsageError("--prompt TEXT or --prompts FILE is missing. Give one of them.")
    if not prompts:
        raise UsageError(f"--prompts {short_text(str(prompts_file))} has no line with text.")
    if not all(prompts):
        raise UsageError("--prompt is empty. Give at least one character.")
    return tuple(prompts)


def _check(folder: Path, prompts: tuple[str, ...], num_tokens: int) -> None:
    """Raise unless the model has a token for every token of the prompts, and enough positions."""
    config = language_config(folder)
    tokenizer = read_tokenizer(folder)
    if tokenizer is None and config.vocab_size < NUM_BYTES:
        raise UsageError(
            f"{short_text(str(folder))} has no tokenizer, so a token is a byte, and the model has "
            f"a vocabulary of {config.vocab_size}. Use a model with at least {NUM_BYTES} tokens."
        )
    positions = getattr(config, "max_position_embeddings", None)
    for prompt in prompts:
        ids = tokens_of_text(prompt, tokenizer, add_special_tokens=True)
        if not ids:
            raise UsageError(f"--prompt {short_repr(prompt)} has no token. Write more text.")
        if max(ids) >= config.vocab_size:
            raise UsageError(
                f"the tokenizer of {short_text(str(folder))} gives token {max(ids)}, and the model "
                f"has {config.vocab_size}. Use the tokenizer of the model."
            )
        if isinstance(positions, int) and len(ids) + num_tokens > positions:
            raise UsageError(
                f"--prompt {short_repr(prompt)} has {len(ids)} tokens; with --tokens {num_tokens} "
                f"that is more than the {positions} positions of the model. Use fewer."
            )


@torch.no_grad()
def _work(axis: Axis, *, run: GenerationRun) -> tuple[list[GeneratedText], int, str]:
    """Continue all prompts on one rank; also the degree, and why rank 0 could not print."""
    with together(axis, "making the model"):
        model: Any = skeleton(run.model)
        tokenizer = read_tokenizer(run.model)
        read_generation_config(model, run.model)
    initialize(parallelize(model, None, axis, scheme=run.scheme))
    load(run.model, model, weights_only=True)
    keep_tokens(model.eval(), run.model)
    writer = TextWriter(tokenizer) if axis.rank == 0 else None
    results = []
    for number, prompt in enumerate(run.prompts):
        if writer is not None:
            writer.begin(prompt, is_first=number == 0)
        results.append(_continue(model, tokenizer, run, prompt, writer))
    return results, axis.size, "" if writer is None else writer.failure


def keep_tokens(model: Any, folder: Path) -> None:
    """Leave only the special tokens in a generation config: the command says all else.

    Raises:
        UsageError: they are no tokens.
    """
    tokens = {name: getattr(model.generation_config, name, None) for name in _TOKENS}
    for name, value in tokens.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and type(each) is not int:
                raise UsageError(
                    f"{short_text(str(folder))} has {name}={short_repr(value)}, which is no token. "
                    "Correct generation_config.json."
                )
    model.generation_config = type(model.generation_config)(**tokens)


def _continue(
    model: Any,
    tokenizer: Any,
    run: GenerationRun,
    prompt: str,
    writer: "TextWriter | None",
) -> GeneratedText:
    ids = torch.tensor([tokens_of_text(prompt, tokenizer, add_special_tokens=True)])
    options: dict[str, Any] = {}
    if run.temperature is not None:
        sampling = KeyedSampling(run.seed, temperature=run.temperature, top_k=run.top_k)
        options["logits_processor"] = [sampling]
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = 0  # one prompt at a time: no place is ever padded
    start = time.perf_counter()
    output: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=run.num_tokens,
        streamer=writer,
        **options,
    )
    seconds = time.perf_counter() - start
    new = output[0, ids.shape[1] :].tolist()
    return GeneratedText(prompt, text_of_tokens(new, tokenizer), tuple(new), seconds)


def text_of_tokens(tokens: list[int], tokenizer: Any = None) -> str:
    """The text of tokens; without a tokenizer they are bytes, and others than bytes are left out.

    Args:
        tokens: of a model.
        tokenizer: of transformers, or None.
    """
    if tokenizer is None:
        valid = bytes(token for token in tokens if token < NUM_BYTES)
        return valid.decode("utf-8", errors="replace")
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class TextWriter:
    """Prints the new tokens of one prompt after another, as `generate` gives them.

    Args:
        tokenizer: of transformers; None: tokens are bytes.

    Attributes:
        failure: why standard output could not be written; "" if it could.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_prompt = True
        self.failure = ""
        self._decode: Any = None
        self._tokens: list[int] = []
        self._printed = ""

    def begin(self, prompt: str, *, is_first: bool) -> None:
        """Print a prompt, to which the next tokens belong."""
        self._is_prompt, self._tokens, self._printed = True, [], ""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._write(f"{'' if is_first else chr(10)}{prompt}")

    def put(self, value: Tensor) -> None:
        """Take tokens; the first are those of the prompt.

        Args:
            value: (1, tokens) or (tokens,), int64.
        """
        if self._is_prompt:
            self._is_prompt = False
            return
        tokens = value.reshape(-1).tolist()
        if self._tokenizer is None:
            self._write(self._decode(bytes(token for token in tokens if token < NUM_BYTES)))
            return
        self._tokens += tokens
        text = text_of_tokens(self._tokens, self._tokenizer)
        if not text.endswith("\ufffd"):  # the character has more tokens
            self._write(text[len(self._printed) :])
            self._printed = text

    def end(self) -> None:
        """Print what is left, and end the line."""
        if self._tokenizer is None:
            self._write(self._decode(b"", True))
        else:
            text = text_of_tokens(self._tokens, self._tokenizer)
            self._write(text[len(self._printed) :])
        self._write("\n")

    def _write(self, text: str) -> None:
        if self.failure:
            return  # the other ranks go on, so this one does too
        try:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        except (BrokenPipeError, ReaderLeftError):
            self.failure = _NO_READER
        except (OSError, UsageError) as error:
            self.failure = files.why(error.__cause__ or error)
