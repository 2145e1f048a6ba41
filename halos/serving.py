"""Responses from an OpenAI-compatible server, or from the vLLM library: the other values of `sampler`.

Both get the ids of the prompt, so the model reads the same tokens as with sampler=hf, and both get a seed per response.
Their random numbers are their own: the same seed gives other texts than sampler=hf.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from halos import secrets
from halos.errors import UserError
from halos.tokens import Encoder

MAX_RETRIES = 8  # of the client, for each request, after errors that may pass; waits grow to 8 s
TIMEOUT = 600.0  # seconds for one response


class Request(NamedTuple):
    """One response to be sampled. number: of its prompt; max_tokens: of the response"""

    number: int
    ids: list[int]
    max_tokens: int
    seed: int


def from_server(
    url: str, requests: Sequence[Request], n_at_once: int, top_p: float, temperature: float
) -> Iterator[tuple[int, str]]:
    """Yield (number, response) as the server answers. It samples from the first model that it lists.

    n_at_once: number of requests in flight
    A query of the address goes with every request. No response has a secret in it: a server may repeat a key.
    Raises UserError if the server refuses a request, or does not answer after MAX_RETRIES.
    """
    import openai

    secrets.learn_environment()
    secrets.learn_urls(url)

    unusable = (openai.OpenAIError, LookupError, TypeError, AttributeError)  # the last three: an answer of another form
    key = os.environ.get("OPENAI_API_KEY") or "none"
    address = urlsplit(url)
    client = openai.OpenAI(
        base_url=urlunsplit(address._replace(query="")),
        default_query=dict(parse_qsl(address.query)),
        api_key=key,
        max_retries=MAX_RETRIES,
        timeout=TIMEOUT,
    )
    failures: list[Exception] = []

    def response_to(request: Request) -> str | None:
        """Ask for one response. After the first failure of any request, ask for nothing more."""
        if failures:
            return None
        try:
            answer = client.completions.create(
                model=model,
                prompt=request.ids,
                max_tokens=request.max_tokens,
                top_p=top_p,
                temperature=temperature,
                seed=request.seed,
            )
            return answer.choices[0].text
        except unusable as error:
            failures.append(error)
            return None

    try:
        model = client.models.list().data[0].id
    except unusable as error:
        raise _failure(url, error) from error
    with ThreadPoolExecutor(n_at_once) as pool:
        asked = {pool.submit(response_to, request): request.number for request in requests}
        try:
            for answered in as_completed(asked):
                text = answered.result()
                if text is not None:
                    yield asked[answered], secrets.redact(text)
        finally:
            pool.shutdown(cancel_futures=True)
    if failures:
        raise _failure(url, failures[0])


def _failure(url: str, error: Exception) -> UserError:
    secrets.cleanse(error)
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"sampler_url={secrets.redact(url)}: {reason}; give the /v1 address of a server on the export of this run, and "
        "run the command again to go on"
    )


def from_vllm(
    directory: str,
    encoder: Encoder,
    requests: Sequence[Request],
    n_at_once: int,
    top_p: float,
    temperature: float,
    max_length: int,
    stop_ids: Sequence[int],
) -> Iterator[tuple[int, str]]:
    """Yield (number, response) from the export in `directory`, in groups of `n_at_once`."""
    import torch
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(model=directory, max_model_len=max_length, tensor_parallel_size=max(1, torch.cuda.device_count()))
    for start in range(0, len(requests), n_at_once):
        group = requests[start : start + n_at_once]
        settings = [
            SamplingParams(
                max_tokens=request.max_tokens,
                top_p=top_p,
                temperature=temperature,
                seed=request.seed,
                stop_token_ids=list(stop_ids),
            )
            for request in group
        ]
        answers = llm.generate([{"prompt_token_ids": request.ids} for request in group], settings)
        for request, answer in zip(group, answers, strict=True):
            yield request.number, encoder.decode_response(answer.outputs[0].token_ids, stop_ids)
