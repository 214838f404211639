"""Chat templates come with a checkpoint: rendered as transformers renders them, within bounded time and memory."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from vold.config.schema import PromptConfig
from vold.data import templates
from vold.data.problems import Problem
from vold.data.prompts import build_prompts
from vold.data.templates import ChatRefused, render_chats
from vold.models.tokenizer import load_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data"
CHATS = [
    [{"role": "user", "content": "1 + 1? <b> & 'q' \u202e é"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb</think>c"}],
]
FEATURES = {
    "filters": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ '%s' | format('a') | upper | trim }}",
    "loop controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unknown }}{{ tools }}",
    "white space": " {% if true %}\n  x\n  {% endif %}\n{{- 'y' -}}\n{% set n = namespace(a=1) %}{{ n.a }}",
    "date": "{{ strftime_now('%Y') }}",
}
REFUSED = {
    "its own refusal": "{{ raise_exception('no system turn') }}",
    "syntax": "{% if %}",
    "types": "{{ 1 + 'a' }}",
    "division": "{{ 1 / 0 }}",
    "undefined": "{{ a.b.c }}",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id') }}",
    "files": "{% include '/etc/passwd' %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "blocks": "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
    "a large range": "{% for x in range(10 ** 9) %}{% endfor %}",
}
UNBOUNDED = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over the problem": "{% for a in messages[0].content %}{% for b in messages[0].content %}"
    "{% for c in messages[0].content %}{% endfor %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** 999999999 }}",
    "a product": "{{ 'x' * 9999999999 }}",
    "doubling": "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "a list": "{{ [0] * 9999999999 }}",
    "center": "{{ 'a' | center(9999999999) }}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "a method": "{{ 'a'.ljust(9999999999) }}",
    "a format method": "{{ '{:>9999999999}'.format(1) }}",
    "indentation": "{{ range(99999) | list | tojson(indent=99999) }}",
    "a text without bounds": "{{ 'x' * 30000000 }}",
}


@pytest.fixture(scope="module")
def tokenizer(tiny_student_dir) -> PreTrainedTokenizerFast:
    return load_tokenizer(tiny_student_dir)


@pytest.fixture(scope="module", autouse=True)
def half_a_second():
    """A worker with less patience than the real one, for this file."""
    renderer = templates._Renderer(seconds=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "_renderer", lambda: renderer)
        yield
    renderer.close()


def with_template(tokenizer, template: str):
    tokenizer.chat_template = template
    return tokenizer


def by_transformers(tokenizer, chat, **options) -> str | None:
    """None where a template raises anything."""
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except Exception:
        return None


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "template",
    ["its own", *FEATURES, *(pytest.param(file, id=file.stem) for file in sorted(REAL.glob("templates/*.jinja")))],
)
def test_it_renders_as_transformers_does(tokenizer, template, add_generation_prompt, tiny_student_dir):
    text = template.read_text() if isinstance(template, Path) else FEATURES.get(template)
    tokenizer = load_tokenizer(tiny_student_dir) if text is None else with_template(tokenizer, text)
    for chat in CHATS:
        expected = by_transformers(tokenizer, chat, add_generation_prompt=add_generation_prompt)
        if expected is None:
            with pytest.raises(ChatRefused):
                render_chats(tokenizer, [chat], add_generation_prompt=add_generation_prompt)
        else:
            assert render_chats(tokenizer, [chat], add_generation_prompt=add_generation_prompt) == [expected]


def test_many_chats_keep_their_order_and_a_refused_one_its_number(tokenizer):
    with_template(tokenizer, "{% if messages[0].content == '150' %}{{ 1 + 'a' }}{% endif %}{{ messages[0].content }}")
    chats = [[{"role": "user", "content": str(number)}] for number in range(150)]
    assert render_chats(tokenizer, chats) == [str(number) for number in range(150)]
    with pytest.raises(ChatRefused, match="TypeError: ") as error:
        render_chats(tokenizer, [*chats, [{"role": "user", "content": "150"}]])
    assert error.value.number == 150


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED)
def test_a_template_that_refuses_or_fails_is_one_line(tokenizer, template):
    problem = Problem("rows:7", "1+1?", "2")
    with pytest.raises(ValueError, match=r"^rows:7: .*chat template refuses this prompt: ") as error:
        build_prompts([problem], with_template(tokenizer, template), PromptConfig())
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1000


@pytest.mark.parametrize("template", UNBOUNDED.values(), ids=UNBOUNDED)
def test_a_template_without_bounds_is_refused_by_name(tokenizer, template, tiny_student_dir):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"^the chat template of .*: take the original checkpoint's$") as error:
        build_prompts([Problem("rows:7", "1+1?" * 500, "2")], with_template(tokenizer, template), PromptConfig())
    assert str(tiny_student_dir) in str(error.value) and not isinstance(error.value, TemplateError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB of this process
    assert render_chats(with_template(tokenizer, "{{ messages[0].content }}"), CHATS[1:2]) == ["Be brief."]


def test_no_template_is_one_line(tokenizer):
    with pytest.raises(ValueError, match="has no chat template: copy the original checkpoint's"):
        render_chats(with_template(tokenizer, None), CHATS[:1])
