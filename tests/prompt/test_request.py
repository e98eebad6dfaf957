"""Turning inputs into a Request: the payloads that clients send, and the errors for invalid ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.errors import LlamaError
from llama.prompt.dialog import Dialog
from llama.prompt.limits import PromptLimits
from llama.prompt.request import Request
from llama.sampling_params import SamplingParams
from llama.serving.schema import input_defaults
from predict import Predictor

LIMITS = PromptLimits(context=4096, longest_piece=16)
DEFAULTS = input_defaults(Predictor.run)
USER = {"role": "user", "content": "Hi!"}


def read(**inputs: Any) -> Request:
    return Request.from_inputs({**DEFAULTS, "prompt": "Hi!", **inputs}, LIMITS)


def error_of(**inputs: Any) -> str:
    with pytest.raises(LlamaError) as caught:
        read(**inputs)
    return str(caught.value)


@pytest.mark.parametrize(
    "inputs",
    [
        {"prompt": "Tell me a joke."},
        {"system_prompt": "You are a pirate."},
        {"prompt": "", "messages": [USER]},
        {"max_new_tokens": 128},
        {"max_tokens": 128},
        {"max_length": 128},
        {"min_new_tokens": -1},
        {"min_tokens": 0},
        {"temperature": 0.75},
        {"temperature": 1},
        {"top_p": 1},
        {"top_k": 50},
        {"repetition_penalty": 1.15},
        {"presence_penalty": 1.15},
        {"frequency_penalty": 0.2},
        {"length_penalty": 1},
        {"stop_sequences": "<end>,<stop>"},
        {"seed": 0},
        {"prompt_template": "{prompt}"},
        {"debug": True},
        {"log_performance_metrics": True},
        {"replicate_weights": ""},
        # combinations that real clients send
        {"max_tokens": 512, "max_new_tokens": 800},
        {"max_length": 500, "max_new_tokens": 500},
        {"max_length": 500, "max_tokens": 512, "max_new_tokens": 800, "min_new_tokens": -1},
        {"repetition_penalty": 1.15, "presence_penalty": 0, "frequency_penalty": 0, "length_penalty": 1},
        {"temperature": 0.01, "top_p": 0.9, "top_k": 0, "max_new_tokens": 500, "repetition_penalty": 1},
        {"debug": False, "top_k": 50, "top_p": 0.9, "temperature": 0.6, "min_tokens": 0, "max_tokens": 512},
        {
            "stream": True,
            "do_sample": False,
            "return_logits": False,
            "stop": "x",
            "length": 3,
            "stop_sequence": "y",
        },
        # extreme but valid values
        {"max_new_tokens": 500_000},
        {"max_new_tokens": 1e20},
        {"max_length": 500.0},
        {"min_new_tokens": 10_000},
        {"system_prompt": "x" * 10_000},
        {"stop_sequences": ",".join(f"stop {i}" for i in range(64))},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e300},
        {"prompt": "\x00\x07\x1b[31m"},
        {"prompt": "unpaired surrogate: \ud800"},
        {"messages": [], "prompt_template": ""},
    ],
    ids=" ".join,
)
def test_every_payload_of_real_clients_is_accepted(inputs: dict[str, Any]) -> None:
    request = read(**inputs)
    for name, value in inputs.items():
        if name in SamplingParams.model_fields:
            assert getattr(request.params, name) == value


@pytest.mark.parametrize(
    ("inputs", "start"),
    [
        ({"prompt": ""}, "E1001 PromptRequired: "),
        ({"prompt": " \n", "messages": []}, "E1001 PromptRequired: "),
        ({"prompt": "[INST] [/INST]"}, "E1001 PromptRequired: "),
        ({"prompt": "a" * 70_000}, "E1002 PromptTooLong: the prompt is at least "),
        ({"system_prompt": "a" * 70_000}, "E1002 PromptTooLong: "),
        ({"prompt_template": "{prompt}" + "a" * 70_000}, "E1002 PromptTooLong: "),
        ({"prompt_template": "{prompt}" * 1000, "prompt": "a" * 1000}, "E1002 PromptTooLong: "),
        ({"prompt": "", "messages": [{**USER, "content": "a" * 70_000}]}, "E1002 PromptTooLong: "),
        ({"prompt": "", "messages": [USER] * 5000}, "E1002 PromptTooLong: "),
        ({"prompt_template": "none"}, "E1003 BadPromptTemplate: "),
        ({"messages": [USER]}, "E1005 BadMessages: "),
        ({"prompt": "", "messages": [USER], "prompt_template": "Q: {prompt}"}, "E1005 BadMessages: "),
        ({"prompt": "", "messages": "Hi!"}, "E1005 BadMessages: "),
        ({"prompt": "", "messages": [USER, USER]}, "E1005 BadMessages: message 1 "),
        ({"replicate_weights": "https://example.com/weights.tar"}, "E1006 UnsupportedWeights: "),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "E1101 MinimumAboveMaximum: the minimum of 9 "),
        ({"min_tokens": 9, "max_length": 8}, "E1101 MinimumAboveMaximum: "),
        ({"temperature": 5.1}, "E1000 InvalidInput: temperature is 5.1"),
        ({"temperature": "warm"}, "E1000 InvalidInput: temperature is a string"),
        ({"temperature": True}, "E1000 InvalidInput: temperature "),
        ({"temperature": float("nan")}, "E1000 InvalidInput: temperature "),
        ({"top_p": -0.1}, "E1000 InvalidInput: top_p "),
        ({"top_k": 1.5}, "E1000 InvalidInput: top_k "),
        ({"top_k": -2}, "E1000 InvalidInput: top_k "),
        ({"max_new_tokens": 0}, "E1000 InvalidInput: max_new_tokens "),
        ({"max_new_tokens": True}, "E1000 InvalidInput: max_new_tokens "),
        ({"seed": 1e20}, "E1000 InvalidInput: seed is 1e+20"),
        ({"seed": 0.5}, "E1000 InvalidInput: seed "),
        ({"stop_sequences": "x" * 1_000_000}, "E1000 InvalidInput: stop_sequences has 1000000 characters"),
        (
            {"stop_sequences": "x" * 257},
            "E1000 InvalidInput: stop_sequences has a sequence of 257 characters",
        ),
        (
            {"stop_sequences": ",".join(f"stop {i}" for i in range(65))},
            "E1000 InvalidInput: stop_sequences has 65 sequences",
        ),
        ({"stop_sequences": ["x"]}, "E1000 InvalidInput: stop_sequences is an array"),
        ({"prompt": 5}, "E1000 InvalidInput: prompt is a number"),
        ({"debug": 1}, "E1000 InvalidInput: debug "),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else " ".join(value),
)
def test_invalid_inputs_are_refused_with_their_error_code(inputs: dict[str, Any], start: str) -> None:
    line = error_of(**inputs)
    assert line.startswith(start)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("inputs", "maximum", "minimum"),
    [
        ({}, 512, 0),
        ({"max_new_tokens": 1, "max_tokens": 2, "max_length": 3}, 1, 0),
        ({"max_tokens": 2, "max_length": 3}, 2, 0),
        ({"max_length": 3}, 3, 0),
        ({"min_new_tokens": 5, "min_tokens": 7}, 512, 5),
        ({"min_tokens": 7}, 512, 7),
        ({"min_new_tokens": 0, "min_tokens": 7}, 512, 0),
        ({"min_new_tokens": -1}, 512, 0),
        ({"min_new_tokens": 600}, 600, 600),
        ({"min_new_tokens": 8, "max_new_tokens": 8}, 8, 8),
    ],
)
def test_token_limits_follow_the_precedence_of_their_names_and_the_minimum(
    inputs: dict[str, int], maximum: int, minimum: int
) -> None:
    params = read(**inputs).params
    assert (params.maximum, params.minimum) == (maximum, minimum)


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        (None, ()),
        ("", ()),
        (",,", ()),
        ("a", ("a",)),
        ("a,b", ("a", "b")),
        (" a , b ", (" a ", " b ")),
        ("a,,b,", ("a", "b")),
        ("\\n\\n,\n", ("\n\n", "\n")),
        ("a,a", ("a",)),
        ("[INST]", ("[INST]",)),
        (r"a\,b,c", ("a,b", "c")),
        (r"\\", ("\\",)),
        (r"\\,a", ("\\", "a")),
        (r"\\n", (r"\n",)),
        (r"\\\n", ("\\\n",)),
        (r"C:\temp\x", (r"C:\temp\x",)),
        ("a\\", ("a\\",)),
        (r"\,", (",",)),
    ],
)
def test_stop_sequences_are_split_at_commas_and_unescaped(text: str | None, stops: tuple[str, ...]) -> None:
    assert read(stop_sequences=text).params.stops == stops


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63, 500.0, 2.0**53, -(2.0**53)])
def test_a_whole_number_is_used_as_the_seed(seed: float) -> None:
    request = read(seed=seed)
    assert request.params.seed == int(seed)
    assert not any("seed" in note for note in request.notes)


def test_a_random_seed_is_chosen_for_each_request_and_noted() -> None:
    first, second = read(), read()
    assert first.params.seed != second.params.seed
    assert any(f"seed: {first.params.seed} " in note for note in first.notes)


@pytest.mark.parametrize("inputs", [{"temperature": 0}, {"top_p": 0}, {"top_k": 1}])
def test_greedy_decoding_needs_no_seed(inputs: dict[str, float]) -> None:
    request = read(**inputs)
    assert request.params.greedy
    assert not any("seed" in note for note in request.notes)


def test_a_length_penalty_is_accepted_and_noted_to_have_no_effect() -> None:
    assert any("length_penalty" in note for note in read(length_penalty=2).notes)
    assert not any("length_penalty" in note for note in read(length_penalty=1).notes)


def test_a_system_message_takes_precedence_over_the_system_prompt() -> None:
    messages = [{"role": "system", "content": "nice"}, USER]
    assert read(prompt="", messages=messages).prompt == Dialog("nice", ("Hi!",))
    assert read(prompt="", messages=[USER], system_prompt="kind").prompt == Dialog("kind", ("Hi!",))


def line_of(inputs: dict[str, Any]) -> str:
    """The error for these inputs, or "" if they are valid."""
    try:
        Request.from_inputs({**DEFAULTS, **inputs}, LIMITS)
    except LlamaError as error:
        return str(error)
    return ""


TEXT_INPUTS = ("prompt", "system_prompt", "prompt_template", "stop_sequences", "replicate_weights")
MARKER = "cancelled-9f3"
MARKED = st.text().map(lambda text: f"{text}{MARKER}{text}")


@settings(deadline=None)
@given(
    texts=st.fixed_dictionaries({}, optional=dict.fromkeys(TEXT_INPUTS, MARKED)),
    messages=st.one_of(
        st.none(),
        st.lists(
            st.one_of(
                MARKED,
                st.dictionaries(
                    st.one_of(st.sampled_from(["role", "content"]), MARKED),
                    st.one_of(st.sampled_from(["user", "assistant", "system"]), MARKED, st.integers()),
                ),
            )
        ),
    ),
)
def test_an_error_is_one_line_that_never_quotes_the_caller(texts: dict[str, str], messages: Any) -> None:
    line = line_of({**texts, "messages": messages})
    assert MARKER not in line
    # Cog reports an error that contains this word as a cancelled prediction.
    assert "cancelled" not in line.lower()
    assert "\n" not in line


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(list(DEFAULTS)),
        st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.booleans(), st.lists(st.integers())),
    )
)
def test_inputs_of_any_type_give_a_request_or_a_user_error(inputs: dict[str, Any]) -> None:
    assert line_of(inputs)[:2] in ("", "E1")
