"""The flags of every command, apart from what runs them: `--help` loads no JAX."""

import argparse
from pathlib import Path

from placement.registry import home_strategies

DTYPES = ("float32", "bfloat16", "float16")
# Contexts of published models reach 131,072 tokens and more, and each sequence's cache is made for the whole of it.
LONGEST_CONTEXT = 4096
# How to train, as `dancemoe_jax.training.TrainConfig` has it (a test compares them).
TRAINING = {
    "steps": 5000,
    "batch": 12,
    "context": 256,
    "learning_rate": 2e-3,
    "warmup": 200,
    "weight_decay": 0.05,
    "clip": 1.0,
    "balance": 0.01,
    "z": 1e-3,
    "seed": 0,
}
_TRAINING_HELP = {
    "steps": "training steps",
    "batch": "sequences a step, spread evenly over the domains",
    "context": "tokens a sequence",
    "learning_rate": "largest learning rate",
    "warmup": "steps in which the learning rate rises to it",
    "weight_decay": "weight decay",
    "clip": "largest norm of a gradient",
    "balance": "weight of the load-balancing loss",
    "z": "weight of the router's z-loss",
    "seed": "of the weights and the batches",
}


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations (float32)")
    parser.add_argument("--int8", action="store_true", help="hold routed experts as int8, a scale per output channel")
    _add_kernels(parser)
    parser.add_argument("--devices", type=int, default=1, help="devices to shard the experts over (1)")
    parser.add_argument("--context", type=int, help=f"longest sequence (the model's, at most {LONGEST_CONTEXT})")


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    text = "native calls on CPUs where they can be had, or XLA alone (auto)"
    parser.add_argument("--kernels", choices=("auto", "xla"), default="auto", help=text)


def _add_domain(parser: argparse.ArgumentParser) -> None:
    text = (
        "a domain is one kind of text, such as what one group of users works on: a name, and a file or directory of UTF-8 "
        "text; give the flag once for each (default: code, prose and arithmetic, from Python's own sources or generated)"
    )
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=PATH", help=text)


def _add_secret(parser: argparse.ArgumentParser) -> None:
    text = (
        "what all servers have to know, the same file everywhere; made if it is not there (in the user's cache folder)"
    )
    parser.add_argument("--secret-file", type=Path, metavar="FILE", help=text)


def serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", metavar="C.toml", help="the servers (default: one, this machine)")
    add("--server", metavar="NAME", help="be this one (default: start every server of the file that is this machine)")
    add("--model", type=Path, metavar="DIR", help="model directory or store (default: the bundled model)")
    _add_http(parser)
    add("--placement", metavar="X.json", help="what is where (default: planned for users who are all alike)")
    add(
        "--requests",
        metavar="FILE",
        help="JSON lines; - for standard input (default without --http; with it there are none)",
    )
    add("--coordinator", metavar="HOST:PORT", help="where the servers meet (default: the first server's host)")
    add(
        "--join",
        metavar="HOST:PORT",
        help="come to a cluster that serves, where its `migrate --add` waits for this server",
    )
    _add_secret(parser)
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for the other servers (60)")
    add("--drain", type=float, default=30.0, metavar="S", help="seconds for running requests when told to end (30)")
    add("--compile-cache", metavar="DIR|off", help="where compiled programs are kept (the user's cache folder)")
    add("--sequences", type=int, default=8, metavar="N", help="sequences a device serves at once (8)")
    text = "memory of a device for keys and values (room for 1,024 tokens a sequence, and for all that experts leave)"
    add("--kv-cache", metavar="SIZE", help=text)
    add("--max-step-tokens", type=int, default=64, metavar="N", help="prompt tokens that a device takes in a step (64)")
    text = "up to four times as many where nobody decodes (on CPUs; elsewhere, and with --kernels xla, last bits of a text's"
    text += " numbers then depend on what else is served)"
    add("--wide-prefill", action=argparse.BooleanOptionalAction, help=text)
    add("--dtype", choices=DTYPES, default="float32", help="of weights and activations (float32)")
    add("--int8", action="store_true", help="hold routed experts as int8")
    _add_kernels(parser)
    add(
        "--state",
        type=Path,
        metavar="DIR",
        help="folder for the record of the placement in force; lets experts migrate",
    )
    add("--interval", default="60s", metavar="T", help="between revisions of the placement (60s); 0s for none")
    add("--half-life", metavar="T", help="after which an activation counts half (the interval, or 60s)")
    add("--horizon", default="300s", metavar="T", help="over which a migration has to pay (300s)")
    add("--strategy", default="latency", choices=sorted(home_strategies()), help="of revised placements (latency)")
    add(
        "--staging-memory", default="1GB", metavar="SIZE", help="host memory of a server for experts on their way (1GB)"
    )
    add("--staging-bandwidth", metavar="RATE", help="at which a server reads them at most, such as 200MB/s (no limit)")
    add("--context", type=int, metavar="N", help="longest sequence (the model's, at most 4096)")


def _add_http(parser: argparse.ArgumentParser) -> None:
    """Flags of the front door; `--front-door` is how it starts its worker."""
    add = parser.add_argument
    add("--http", metavar="HOST:PORT", help="answer HTTP there, as OpenAI's API has it, instead of JSON lines")
    add("--queue", type=int, default=256, metavar="N", help="HTTP requests that may be under way at once (256)")
    text = (
        "longest wait for a turn of a request that is accepted (--deadline); auto: answers take twice the usual at most"
    )
    add("--wait", metavar="T|auto", help=text)
    add("--hold", type=float, default=60.0, metavar="S", help="seconds that requests wait for a lost server (60)")
    add("--stuck", type=float, default=30.0, metavar="S", help="seconds without a step until a worker is replaced (30)")
    add("--deadline", type=float, default=600.0, metavar="S", help="seconds for a request to be answered (600)")
    add(
        "--route",
        action="store_true",
        help="hand requests to the server whose experts their `user` needs, where that pays",
    )
    add("--traces", metavar="URL", help="send a trace of each request to this OpenTelemetry collector (OTLP over HTTP)")
    add("--tokens", type=Path, metavar="FILE", help="bearer tokens of users, one a line (default: none is asked for)")
    add("--operator-token", type=Path, metavar="FILE", help="the operator's token (default: operators come from here)")
    add("--tls-cert", metavar="FILE", help="certificate chain, for https")
    add("--tls-key", metavar="FILE", help="its key (default: in the same file)")
    add("--front-door", metavar="SOCKET", help=argparse.SUPPRESS)


def migrate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--state", required=True, type=Path, metavar="DIR", help="the folder that `serve --state` was given")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="the placement in force and what is under way (default)")
    what.add_argument("--plan", action="store_true", help="replan now from what users activate; migrate if that pays")
    what.add_argument("--to", metavar="X.json", help="migrate to this placement")
    what.add_argument(
        "--memory",
        action="append",
        metavar="WHERE=SIZE",
        help="give a device (edge-c/0) or each of a server (edge-c) less memory, or `all` it has",
    )
    what.add_argument("--drain", action="append", metavar="SERVER", help="leave no expert on this server")
    what.add_argument("--undrain", action="append", metavar="SERVER", help="use all of its memory again")
    what.add_argument(
        "--add", metavar="C.toml", help="take in the servers that this cluster file has beside those that serve"
    )
    what.add_argument(
        "--abort", action="store_true", help="stop the migration under way where it is, or wait for no server"
    )
    add("--dry-run", action="store_true", help="say what would be done, and do nothing")
    add("--json", action="store_true", help="print JSON")
    _add_secret(parser)


def calibrate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", required=True, metavar="C.toml", help="the servers")
    add("--out", required=True, type=Path, metavar="NEW.toml", help="cluster file with what was measured")
    add("--server", metavar="NAME", help="be this one (default: start every server of the file that is this machine)")
    add("--model", type=Path, metavar="DIR", help="whose experts to read and compute (default: the bundled model)")
    add("--coordinator", metavar="HOST:PORT", help="where the servers meet (default: the first server's host)")
    _add_secret(parser)
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for the other servers (60)")


def generate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The bundled model continues Python code, documentation prose and worked lines of arithmetic; a sum needs a line "
        r"before it: --prompt $'1 + 1 = 2\n47 + 38 =' is continued by 85."
    )
    parser.add_argument(
        "--model", type=Path, default=None, help="model directory or store (default: the bundled model)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue; - reads all of standard input as it is")
    source.add_argument(
        "--prompt-file", help='prompts, one a line, or JSON lines {"prompt": …} or {"messages": […]}; - standard input'
    )
    parser.add_argument(
        "--chat", action="store_true", help="take a prompt as a user's message, by the model's template"
    )
    parser.add_argument("--max-tokens", type=int, default=100, help="tokens to generate at most (100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among so many likeliest tokens; 0 = all (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="among the fewest tokens that are so probable (1)")
    parser.add_argument("--min-p", type=float, default=0.0, help="among tokens so probable against the likeliest (0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids what was said (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, for each prompt alike (0)")
    parser.add_argument("--stop", action="append", default=[], help="text that ends the output; may be repeated")
    parser.add_argument("--stop-token", action="append", type=int, default=[], help="token id that ends the output")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt instead of the text")
    _add_model(parser)


def score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=None, help="model directory or store (default: the bundled model)"
    )
    parser.add_argument("--ids", type=Path, required=True, help="int [batch, length] token ids, a .npy file")
    parser.add_argument("--out", type=Path, required=True, help="where to write float32 [batch, length, vocabulary]")
    parser.add_argument(
        "--placement-seed", type=int, help="scatter the experts and copies at random (else dealt evenly)"
    )
    _add_model(parser)


def convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="Hugging Face directory, or a store")
    parser.add_argument("target", type=Path, help="store to write, or Hugging Face directory if the source is a store")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the stored weights (bfloat16)")
    parser.add_argument("--int8", action="store_true", help="store routed experts as int8 (to a store only)")
    parser.add_argument("--shard-size", default="4GB", help="of the safetensors files (4GB)")


def train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a small mixture of experts on text of several domains, drawn evenly, and write it as a model directory. "
        "A domain is one kind of text; the experts specialize by domain, which is what placement makes use of."
    )
    parser.add_argument("--out", type=Path, required=True, help="model directory to write (Hugging Face layout)")
    parser.add_argument("--checkpoints", type=Path, help="Orbax checkpoints, resumed from if any (OUT.checkpoints)")
    _add_domain(parser)
    shape = {
        "layers": (6, "layers of the model"),
        "experts": (32, "experts of each layer"),
        "top_k": (4, "experts that a token goes to"),
        "hidden": (128, "width of the model: 32 or a multiple of 64"),
        "expert_size": (64, "width of one expert"),
        "save_every": (500, "steps from one checkpoint to the next"),
    }
    flags = shape | {name: (default, _TRAINING_HELP[name]) for name, default in TRAINING.items()}
    for name, (default, what) in flags.items():
        flag, what = f"--{name.replace('_', '-')}", f"{what} (default: {default:g})"
        parser.add_argument(flag, type=type(default), default=default, metavar="N", help=what)


def evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=None, help="model directory (default: the bundled model)")
    _add_domain(parser)
    parser.add_argument("--bytes", type=int, default=200_000, help="held-out text to read of each domain (200000)")
    parser.add_argument("--seed", type=int, default=0, help="decides the arithmetic lines")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="cluster.toml (default: three servers of its own)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory (default: the bundled model)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, prompts and lengths (default: 0)")
    parser.add_argument(
        "--phase-seconds", type=float, default=8.0, metavar="S", help="length of each phase (default: 8)"
    )
    text = "requests a second at each server (default: half of what this machine can answer, measured first)"
    parser.add_argument("--rate", type=float, metavar="R", help=text)
    parser.add_argument("--report", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the result as one small picture")
    parser.add_argument("--processes", action="store_true", help="one process for each server (default: one for all)")
    parser.add_argument("--server", metavar="NAME", help=argparse.SUPPRESS)  # be this one's process
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=argparse.SUPPRESS)
