"""Text by domain, for training, held-out evaluation and the demo's prompts.

Three domains that every Python installation has or that are generated: `code` (the standard library's source without its
docstrings), `prose` (those docstrings and pydoc's language reference) and `arithmetic` (worked lines). Each document
belongs to the training or to the held-out part by a hash of its name, so that no document is ever in both, whichever
Python version reads them; arithmetic holds out a tenth of all pairs of two-digit numbers.
"""

import ast
import dataclasses
import hashlib
import inspect
import io
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from placement import InputError

DOMAINS = ("code", "prose", "arithmetic")
HELD_OUT_PERCENT = 5
HELD_OUT_PAIRS_PERCENT = 10
# Not source that somebody wrote to be read: tests, generated tables, other projects' packages.
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "lib2to3"}


@dataclasses.dataclass(frozen=True)
class Domain:
    """Documents of one kind of text, split by name into training and held-out ones."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def bucket(name: str) -> int:
    """A number from 0 to 99 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100


def load_domains(seed: int = 0, *, train: bool = True) -> dict[str, Domain]:
    """The three built-in domains.

    Args:
        seed: decides the arithmetic lines, not the split.
        train: whether the training part is read too; the held-out part alone takes a second.
    """
    code: dict[str, str] = {}
    prose: dict[str, str] = {f"topic:{name}": text for name, text in sorted(_topics().items()) if len(text) > 200}
    for name, file in _stdlib_files():
        code_name, prose_name = f"module:{name}", f"docs:{name}"
        if train or is_held_out(code_name) or is_held_out(prose_name):
            try:
                source = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            code[code_name], prose[prose_name] = _split_docstrings(source)
    train_sums = _arithmetic(seed, 400, held_out=False) if train else ()
    return {
        "code": _split("code", code),
        "prose": _split("prose", prose),
        "arithmetic": Domain("arithmetic", train_sums, _arithmetic(seed, 20, held_out=True)),
    }


def is_held_out(name: str) -> bool:
    return bucket(name) < HELD_OUT_PERCENT


def read_domain(name: str, path: Path) -> Domain:
    """A user's own domain: a text file (split by blank lines) or a directory of text files.

    Raises:
        InputError: nothing readable there, or too little to hold out some of it.
    """
    documents: dict[str, str] = {}
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            documents[str(file.relative_to(path))] = file.read_text(encoding="utf-8", errors="replace")
    elif path.is_file():
        blocks = path.read_text(encoding="utf-8", errors="replace").split("\n\n")
        documents = {f"{i}:{block[:40]}": block for i, block in enumerate(blocks) if block.strip()}
    domain = _split(name, documents)
    if not domain.train or not domain.held_out:
        raise InputError(
            f"domain {name!r}: {path} has {len(documents)} documents, too few to train on and hold some out"
        )
    return domain


def held_out_sums() -> list[tuple[int, int]]:
    """All held-out ordered pairs of two-digit numbers whose sum the training lines never show, in any order."""
    return [(a, b) for a in range(10, 100) for b in range(10, 100) if _is_held_out(a, b)]


def prompts(domain: Domain, count: int, length: int, seed: int) -> list[bytes]:
    """Held-out prompts of at most `length` bytes, cut at the start of a line.

    Arithmetic prompts are worked lines that end in an open held-out sum.
    """
    rng = np.random.default_rng([seed, bucket(domain.name)])
    if domain.name == "arithmetic":
        return [_open_sum(domain, rng, length) for _ in range(count)]
    texts = [text for text in domain.held_out if len(text) > 3 * length]
    if not texts:
        raise InputError(f"domain {domain.name!r}: no held-out document of {3 * length} characters or more")
    result = []
    while len(result) < count:
        text = texts[rng.integers(len(texts))]
        start = text.find("\n", int(rng.integers(len(text) - 2 * length))) + 1
        prompt = text[start:].lstrip("\n").encode()[:length].decode(errors="ignore").rstrip()
        if len(prompt) >= length // 2:
            result.append(prompt.encode())
    return result


def _open_sum(domain: Domain, rng: np.random.Generator, length: int) -> bytes:
    pairs = held_out_sums()
    a, b = pairs[rng.integers(len(pairs))]
    question = f"{a} + {b} ="
    lines = domain.held_out[rng.integers(len(domain.held_out))].split("\n")[:-1]
    start = int(rng.integers(len(lines) // 2))
    shown = ""
    for line in lines[start:]:
        if len(shown) + len(line) + 1 + len(question) > length:
            break
        shown += f"{line}\n"
    return (shown + question).encode()


def _split(name: str, documents: dict[str, str]) -> Domain:
    documents = {key: text for key, text in documents.items() if text.strip()}
    held = {key for key in documents if is_held_out(key)}
    return Domain(
        name,
        tuple(text for key, text in documents.items() if key not in held),
        tuple(text for key, text in documents.items() if key in held),
    )


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts):
            yield relative.as_posix(), file


def _split_docstrings(source: str) -> tuple[str, str]:
    """Source without its docstrings, and the docstrings that are prose (no examples of code) as one text."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", ""
    lines = io.StringIO(source).readlines()
    kept = [True] * len(lines)
    prose = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            text = ast.get_docstring(node, clean=False)
            if text is None or first.end_lineno is None:
                continue
            # A body of nothing but a docstring stays, so that what is left still parses.
            if len(node.body) > 1:
                kept[first.lineno - 1 : first.end_lineno] = [False] * (first.end_lineno - first.lineno + 1)
            if len(text) >= 80 and ">>>" not in text:
                prose.append(inspect.cleandoc(text))
    code = "".join(line for line, keep in zip(lines, kept, strict=True) if keep)
    return code, "\n\n".join(prose)


def _is_held_out(a: int, b: int) -> bool:
    return a >= 10 and b >= 10 and bucket(f"sum:{min(a, b)}+{max(a, b)}") < HELD_OUT_PAIRS_PERCENT


def _arithmetic(seed: int, documents: int, *, held_out: bool) -> tuple[str, ...]:
    """Documents of 1,000 worked lines. Held-out ones take only held-out pairs for sums and differences."""
    rng = np.random.default_rng([seed, int(held_out)])
    result = []
    for _ in range(documents):
        lines = []
        while len(lines) < 1000:
            a, b = (int(v) for v in rng.integers(0, 100, 2))
            kind = rng.integers(10)
            if kind >= 8:
                a, b = a % 13, b % 13
                lines.append(f"{a} * {b} = {a * b}")
            elif _is_held_out(a, b) == held_out:
                lines.append(f"{a} + {b} = {a + b}" if kind < 5 else f"{a + b} - {b} = {a}")
        result.append("\n".join(lines) + "\n")
    return tuple(result)


EOS = 256  # ids 0 to 255 are the bytes


def encode(documents: tuple[str, ...]) -> np.ndarray:
    """Documents as bytes, each closed by the end-of-text token; uint16 [tokens]."""
    parts = []
    for text in documents:
        parts += [np.frombuffer(text.encode(), np.uint8).astype(np.uint16), np.array([EOS], np.uint16)]
    return np.concatenate(parts)


def read_domains(specifications: list[str], seed: int) -> list[Domain]:
    """The domains of `--domain` flags, or the built-in ones where there is none.

    Raises:
        InputError: a flag is not NAME=PATH, repeats a name, or its text cannot be used.
    """
    if not specifications:
        built_in = load_domains(seed)
        return [built_in[name] for name in DOMAINS]
    domains = []
    for specification in specifications:
        name, equals, path = specification.partition("=")
        if not equals or not name:
            raise InputError(f"--domain {specification!r}: write NAME=PATH")
        if name in [domain.name for domain in domains]:
            raise InputError(f"--domain {specification!r}: the name {name!r} is taken; give every domain its own")
        domains.append(read_domain(name, Path(path)))
    return domains
