"""Arrivals: our own file, and traces as Azure, BurstGPT and Mooncake published them."""

import json

import numpy as np
import pytest

from placement import InputError
from placement.data.arrivals import Arrivals

OURS = "t_s,prompt_tokens,output_tokens\n0.0,100,20\n1.5,200,10\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
AZURE_2024 = AZURE.replace("6805900", "680590+00:00").replace("9951690", "995169+00:00")
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,230,1317,Conversation log\n46,GPT-4,12,0,12,API log\n"
)
MOONCAKE = "".join(
    json.dumps({"timestamp": time, "input_length": length, "output_length": 52, "hash_ids": [46, 47]}) + "\n"
    for time, length in ((27482, 6955), (30535, 6472))
)


def load(tmp_path, text, **options):
    (tmp_path / "a").write_text(text, newline="")
    return Arrivals.load(tmp_path / "a", ("a", "b"), **options)


@pytest.mark.parametrize(
    "text",
    [
        OURS,
        "\ufeff" + OURS,
        OURS.replace("\n", "\r\n"),
        OURS.replace(",", ", "),
        OURS.replace(",", ";"),
        OURS.replace(",", "\t"),
    ],
)
def test_one_reading_however_it_is_written(tmp_path, text):
    found = load(tmp_path, text)
    assert (found.seconds.tolist(), found.prompt.tolist(), found.output.tolist()) == ([0, 1.5], [100, 200], [20, 10])


@pytest.mark.parametrize(
    ("text", "seconds", "prompt", "output"),
    [
        (AZURE, [0, 4.314579], [374, 396], [44, 109]),
        (AZURE_2024, [0, 4.314579], [374, 396], [44, 109]),
        ("\ufeff" + AZURE.replace("\n", "\r\n"), [0, 4.314579], [374, 396], [44, 109]),
        (BURST, [5, 45], [472, 1087], [18, 230]),  # the request without a response had failed
        (MOONCAKE, [27.482, 30.535], [6955, 6472], [52, 52]),
    ],
)
def test_published_traces(tmp_path, text, seconds, prompt, output):
    notes = []
    found = load(tmp_path, text, notes=notes)
    assert notes == ["1 requests without a response are left out"] * (text == BURST)
    assert np.allclose(found.seconds, seconds, rtol=0, atol=1e-6)
    assert (found.prompt.tolist(), found.output.tolist()) == (prompt, output)
    assert np.allclose(load(tmp_path, text, stretch=10.0).seconds, 10 * np.array(seconds), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "time,in,out\n1,2,3\n",
            "column t_s is missing; the file has time, in, out; the header has t_s,prompt_tokens,",
        ),
        (
            AZURE.replace("18:15:50", "25:15:50"),
            "line 3: TIMESTAMP = '2023-11-16 25:15:50.9951690': must be a date and time",
        ),
        (AZURE.replace("18:15:50", "18:15:40"), "request 2: TIMESTAMP = "),
        (BURST.replace("230", "-3"), "line 3: Response tokens = '-3': must be a finite number, at least 0"),
        (MOONCAKE.replace("6472", '"x"'), "line 2: input_length = 'x': must be a number"),
        (MOONCAKE.replace("6472", "true"), "line 2: input_length = True: must be a finite number"),
        (MOONCAKE + "[]\n", "line 3: []: must be an object, as the first line is"),
        (MOONCAKE + "{\n", "line 3: not valid JSON"),
        (OURS.replace("20", "0"), "line 2: output_tokens = '0': must be a whole number from 1"),
        (OURS.replace("1.5", "1e999"), "t_s = '1e999': must be a finite number"),
        (OURS + "9,9,9,9\n", "line 4: has 4 cells, the header has 3"),
    ],
)
def test_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
