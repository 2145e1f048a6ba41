"""Servers of chat models: their addresses, keys and clients, those of Azure included.

An address is --base_url as it is given; a query such as ?api-version=2024-10-21 goes with every request. Change
`make_client` for a server that wants its key in another way.
"""

import os
import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from halos.errors import UserError

OPENAI_URL = "https://api.openai.com/v1"
ADDRESS = re.compile(r"https?://[^\s/?#]+[^\s#]*", re.ASCII)


def check_address(url: str) -> str:
    """Return an address without a slash at its end. Raises UserError if it is none."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").removesuffix(".")
        usable = bool(ADDRESS.fullmatch(url)) and url.isprintable() and parts.port != 0
        usable = usable and all(0 < len(label) < 64 for label in host.split(".")) and bool(host.encode("idna"))
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"--base_url {url} is not an address; give one such as http://localhost:8000/v1")
    return urlunsplit(parts._replace(path=parts.path.rstrip("/")))


def split(url: str) -> tuple[str, dict[str, str]]:
    """Split an address into what comes before its query, and the query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="")), dict(parse_qsl(parts.query, keep_blank_values=True))


def is_azure(url: str) -> bool:
    """Return whether an address is one of Azure's, which has versions of its API, and a key of its own."""
    return "api-version" in split(url)[1] or (urlsplit(url).hostname or "").endswith(".azure.com")


def key_names(url: str) -> list[str]:
    """The variables of the environment that may have the key; the first one that is set is taken."""
    return ["AZURE_OPENAI_API_KEY", "OPENAI_API_KEY"] if is_azure(url) else ["OPENAI_API_KEY"]


def find_key(url: str) -> str:
    """Find the key in the environment; "" if there is none. Raises UserError if it cannot be sent."""
    for name in key_names(url):
        key = os.environ.get(name, "").strip()
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"{name} has characters that no key has; copy the key again")
        if key:
            return key
    return ""


def make_client(url: str, api_key: str, **options: Any) -> Any:
    """Make an openai.AsyncOpenAI. With a version and without /v1, Azure takes another header, and paths of models."""
    import openai

    address, query = split(url)
    version = query.pop("api-version", None)
    if version is None or address.endswith("/v1"):
        query |= {} if version is None else {"api-version": version}
        return openai.AsyncOpenAI(base_url=address, api_key=api_key, default_query=query, **options)
    if not urlsplit(address).path.strip("/"):
        address += "/openai"
    # A path of the model is added, unless the address has one: .../openai/deployments/NAME
    return openai.AsyncAzureOpenAI(
        base_url=address, api_key=api_key, api_version=version, default_query=query, **options
    )
