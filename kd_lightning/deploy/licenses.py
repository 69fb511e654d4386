"""Licences as the Hugging Face Hub names them."""

from __future__ import annotations

import re

from kd_lightning.errors import InputError

_NAMES = """\
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl
odc-by ofl-1.1 open-mdw openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = (*_NAMES.split(),)
"""The identifiers, see https://huggingface.co/docs/hub/repositories-licenses."""


def license_entries(text: str, option: str) -> dict[str, str]:
    """Return the entries of a model card for a licence.

    Args:
        text: An identifier; or any other name or link, which becomes ``license: other`` with its name and link.
        option: The option, for the message.

    Raises:
        InputError: If it is empty, is ``other`` without a name, or is an identifier with other punctuation.

    >>> license_entries("MIT", "--license")
    {'license': 'mit'}
    >>> license_entries("Acme Terms", "--license")
    {'license': 'other', 'license_name': 'acme-terms'}
    """
    text = " ".join(text.split())
    plain = text.lower()
    if not plain or plain == "other":
        raise InputError(f"{option} must be an identifier such as apache-2.0, or a name or link, got {text!r}")
    if plain in LICENSES:
        return {"license": plain}
    if near := [known for known in LICENSES if re.sub(r"\W", "", known) == re.sub(r"\W", "", plain)]:
        raise InputError(f"{option}: the Hub writes {text} as {near[0]}")
    link = re.search(r"https?://\S+", text)
    name = text.replace(link[0], "").strip() if link else text
    slug = re.sub(r"[^a-z0-9.]+", "-", (name or text.partition("://")[2]).lower()).strip("-.")
    entries = {"license": "other", "license_name": slug or "other"}
    return {**entries, "license_link": link[0]} if link else entries
