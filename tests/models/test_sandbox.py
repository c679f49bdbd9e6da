from __future__ import annotations

import threading
import time

import pytest
from jinja2.exceptions import SecurityError, TemplateError

from headrace.models.sandbox import TemplateRanAway, TemplateSandbox, Watchdog

GROWING = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ (9**64)**64 }}",
    "{{ 2**(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ 'a'.expandtabs(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a' | indent(1000000000, true) | length if false else 'a'.center(10**8) }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ''.join([ns.s, ns.s]) %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s.replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s | replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ lipsum(n=100000) }}",
    "{{ strftime_now('%Y' * 100) }}",
]

ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | list | sum }}{% endfor %}",
]


@pytest.mark.parametrize("source", GROWING)
@pytest.mark.alone
def test_what_grows_without_bound_is_refused_before_it_grows(source: str) -> None:
    begun = time.perf_counter()
    with pytest.raises((TemplateError, SecurityError, OverflowError)):
        TemplateSandbox().from_string(source).render()
    assert time.perf_counter() - begun < 3


@pytest.mark.parametrize("source", ENDLESS)
@pytest.mark.alone
def test_what_runs_without_end_is_ended(source: str) -> None:
    template = TemplateSandbox().from_string(source)
    begun = time.perf_counter()
    with pytest.raises(TemplateRanAway), Watchdog().limit(0.1):
        template.render()
    assert time.perf_counter() - begun < 1


def test_recursion_is_ended() -> None:
    with pytest.raises(RecursionError):
        TemplateSandbox().from_string("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").render()


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.x }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__.x }}", "{{ messages.pop() }}"]
)
def test_pythons_insides_are_closed(source: str) -> None:
    template = TemplateSandbox().from_string(source)
    with pytest.raises(SecurityError):
        template.render(messages=[1])


def test_an_end_that_comes_too_late_hits_nobody() -> None:
    watchdog = Watchdog()
    for _ in range(50):
        with watchdog.limit(0.2):
            pass
    with pytest.raises(TemplateRanAway), watchdog.limit(0.02):
        # One long C call: the error can only surface afterwards, and must surface in here.
        time.sleep(0.15)
    time.sleep(0.1)
    assert sum(range(10**5)) > 0


def test_threads_are_watched_apart() -> None:
    watchdog = Watchdog()
    ended: list[str] = []

    def run(name: str, seconds: float) -> None:
        try:
            with watchdog.limit(seconds):
                until = time.monotonic() + 0.4
                while time.monotonic() < until:
                    pass
        except TemplateRanAway:
            ended.append(name)

    threads = [threading.Thread(target=run, args=("short", 0.05)), threading.Thread(target=run, args=("long", 30.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == ["short"]


def test_what_chat_templates_use_works() -> None:
    source = (
        "{%- set ns = namespace(found=false) -%}{%- for message in messages[::-1] -%}{%- set index = messages|length - 1 - loop.index0 -%}"
        "{%- if loop.first %}{% continue %}{% endif -%}"
        "{{ index ~ ':' ~ message.content.strip('\n').split(' ')[-1] | upper }};{%- endfor -%}"
        "{{ {'a': 'é<'} | tojson }}{{ messages | map(attribute='role') | join(',') }}{{ 'x' * 3 + 'y' }}"
        "{% generation %}!{% endgeneration %}"
        "{{ '{} {}'.format(1, 'a') }}{{ messages[0].get('none', 'd') }}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "user", "content": "a b\n"}, {"role": "assistant", "content": "c"}]
    assert TemplateSandbox().from_string(source).render(messages=messages) == '0:B;{"a": "é<"}user,assistantxxxy!1 ad4'
