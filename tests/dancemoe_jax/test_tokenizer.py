"""Tokenizer files: special tokens wherever they are named, chat templates within limits, damaged files in one line."""

import datetime
import json
import time

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from dancemoe_jax import ModelError, RequestError, bundled_model
from dancemoe_jax.checkpoint.families import read_config
from dancemoe_jax.text.tokenizer import load_tokenizer, load_tokenizer_bundle
from tests.helpers.paths import FIXTURES

CONFIG = read_config(FIXTURES / "families" / "mixtral")
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def model(tmp_path):
    """A directory with a tokenizer that puts <s> in front, and what writes its other files."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hi": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def bundle(template=None, named=None, **fields):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
        if named is not None:
            (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return load_tokenizer_bundle(tmp_path, CONFIG)

    bundle.path = tmp_path
    return bundle


def test_special_tokens_of_older_exports(model):
    bundle = model(
        "{{ bos_token }}{{ messages[0]['content'] }}", {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    )
    assert bundle.special == {"bos_token": "<s>", "eos_token": "</s>"}
    assert bundle.encode_chat(HELLO) == [1, 3]
    assert 2 in bundle.eos_tokens


@pytest.mark.parametrize("add_bos", [True, False, None])
def test_a_prompt_that_brings_its_own_beginning_gets_no_other(model, add_bos):
    bundle = model(bos_token="<s>", **{} if add_bos is None else {"add_bos_token": add_bos})
    assert bundle.encode("<s> hi") == [1, 3]
    assert bundle.encode("hi") == ([3] if add_bos is False else [1, 3])


def test_half_a_surrogate_pair_is_no_token(model):
    bundle = model(named={"bos_token": "\ud800", "eos_token": "</s>"})
    assert bundle.encode("hi") == [1, 3]
    assert 2 in bundle.eos_tokens


def test_tools_have_a_template_of_their_own(model):
    templates = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools | length }}"}]
    bundle = model(chat_template=templates)
    assert bundle.render_chat(HELLO) == "D"
    assert bundle.render_chat(HELLO, tools=[{}]) == "T1"


@pytest.mark.parametrize("template", ["{{ f.arguments | tojson }}", "{{ '' + f.arguments }}", "{{ f.arguments.a }}"])
def test_arguments_of_calls_are_objects_unless_the_template_wants_a_text(model, template):
    bundle = model("{% set f = messages[0].tool_calls[0].function %}" + template)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert bundle.render_chat([message]) == ("1" if template.endswith(".a }}") else '{"a": 1}')
    assert call["function"]["arguments"] == '{"a": 1}'
    cut = {**call, "function": {"name": "add", "arguments": '{"a": '}}
    if "''" in template:
        assert bundle.render_chat([{**message, "tool_calls": [cut]}]) == '{"a": '


@pytest.mark.parametrize("given", ['""', "null"])
def test_a_call_without_arguments_has_an_empty_object(model, given):
    bundle = model("{% for m in messages %}{{ m.tool_calls[0].function.arguments | items | list }}{% endfor %}")
    call = json.loads(f'{{"type": "function", "function": {{"name": "now", "arguments": {given}}}}}')
    assert bundle.render_chat([{"role": "assistant", "content": None, "tool_calls": [call]}]) == "[]"


def test_what_a_template_refuses_is_said_as_it_was_refused_first(model):
    bundle = model(
        "{{ raise_exception('no role ' + messages[0].role) if messages[0].tool_calls[0].function.arguments.a }}"
        "{{ '' + messages[0].tool_calls[0].function.arguments + 1 }}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    with pytest.raises(RequestError, match="no role narrator"):
        bundle.render_chat([{"role": "narrator", "content": None, "tool_calls": [call]}])


def test_a_model_without_a_template_says_so(model):
    with pytest.raises(RequestError, match=r"has no chat template; give plain text, or add chat_template\.jinja"):
        model().encode_chat(HELLO)


def test_templates_know_what_published_ones_use(model):
    template = """{%- generation -%}{{ messages | tojson }}{%- endgeneration -%}
{%- for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}{{ strftime_now('%d %b %Y') }}
{%- if add_generation_prompt %}<a>{% endif %}{{ x }}"""
    rendered = model(template).render_chat(HELLO, now=lambda: datetime.datetime(2024, 7, 26), x="<&>")
    assert rendered == '[{"role": "user", "content": "hi"}]26 Jul 2024<a><&>'


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "2 s of processor time"),
        ("{{ 9**(9**9) }}", "2 s of processor time"),
        ("{{ 'x' * 10**10 }}", "more than"),
        ("{{ 'x'.ljust(10**10) }}", "more than"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_templates_that_fail_or_never_end_are_one_line(model, template, words):
    bundle, begin = model(template), time.monotonic()
    with pytest.raises(RequestError, match="the chat template cannot take these messages") as error:
        bundle.render_chat(HELLO)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 60
    assert model("{{ messages[0].role }}").render_chat(HELLO) == "user"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer.json", "[" * 100_000, "not a tokenizer"),
        ("tokenizer_config.json", "[" * 100_000, "nest deeper"),
        ("tokenizer_config.json", '{"add_bos_token": 1}', "add_bos_token = 1"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is a int"),
        ("tokenizer_config.json", '{"chat_template": [{"name": ["x"], "template": {}}]}', "chat_template is a dict"),
        ("special_tokens_map.json", "[]", "holds a list"),
        ("generation_config.json", '{"eos_token_id": [1, 2000000]}', "eos_token_id has 2000000"),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}', "eos_token_id has"),
        ("chat_template.jinja", b"\xff", "not readable as text"),
        ("chat_template.jinja", "x" * (2**20 + 1), "1048577 characters"),
    ],
)
def test_damaged_files_are_named(model, file, content, words):
    model()
    (model.path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as error:
        load_tokenizer_bundle(model.path, CONFIG)
    assert words in str(error.value)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_panics_is_refused(model):
    """A normalizer whose table is cut: the library ends in a panic, which is no Exception."""
    fields = json.loads((model.path / "tokenizer.json").read_text())
    fields["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (model.path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="not a tokenizer"):
        load_tokenizer(model.path, CONFIG)


def test_the_bundled_model_has_a_chat_template():
    bundle = load_tokenizer_bundle(bundled_model(), read_config(bundled_model()))
    answered = [{"role": "user", "content": "12 + 30 ="}, {"role": "assistant", "content": " 42"}]
    assert bundle.render_chat([*answered, {"role": "user", "content": "12 + 31 ="}]) == "12 + 30 =\n 42\n12 + 31 ="
    assert bundle.encode_chat(answered[:1]) == list(b"12 + 30 =")
