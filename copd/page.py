"""A document of headings, tables and pictures as Markdown, and as one HTML page without scripts or network."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Table:
    """Cells are text; `**` makes one bold."""

    header: list[str]
    rows: list[list[str]]
    caption: str


@dataclass(frozen=True)
class Picture:
    name: str
    """file name without .svg, in the folder figures"""
    svg: str
    caption: str


@dataclass(frozen=True)
class Card:
    """A prompt and what models answered."""

    domain: str
    prompt: str
    images: list[str]
    """data URIs"""
    answer: str
    answers: dict[str, tuple[str, float]] = field(default_factory=dict)
    """model -> (completion, reward)"""


@dataclass(frozen=True)
class Cards:
    text: str
    caption: str
    cards: list[Card]


@dataclass(frozen=True)
class Sources:
    text: str
    texts: dict[str, str]
    """title -> source, folded away"""


Block = Heading | Table | Picture | Cards | Sources
CSS = """
body { max-width: 1080px; margin: 2.5rem auto; padding: 0 1.25rem; color: #222; background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.8rem; margin: 0 0 .3rem }
h2 { font-size: 1.4rem; margin: 3rem 0 0; border-top: 2px solid #222; padding-top: .6rem }
h3 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
h4 { font-size: 1rem; margin: 1.2rem 0 .4rem }
nav { display: flex; gap: 1.2rem }
a { color: #0072B2 }
figure { margin: 0 0 1.2rem; overflow-x: auto }
figure svg { width: 100%; height: auto }
figcaption, section > p { color: #555; font-size: .87rem; max-width: 52rem; margin: .4rem 0 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
tbody tr:hover { background: #f6f6f4 }
th, td { padding: .28rem .9rem .28rem 0; text-align: right; border-bottom: 1px solid #e6e6e6; white-space: nowrap }
th { font-weight: 600; border-bottom: 1px solid #888 }
th:first-child, td:first-child { text-align: left; padding-right: 1.6rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .8rem 1rem; font-size: .85rem; overflow-x: auto }
.card p { margin: .3rem 0 }
.card table { width: 100% }
.card td, .card th { vertical-align: top; padding: .15rem .7rem .15rem 0 }
.card td:nth-child(2), .card th:nth-child(2) { text-align: left; white-space: normal; width: 99% }
.card img { height: 64px; max-width: 100%; margin: 0 .3rem .3rem 0; border: 1px solid #ccc; image-rendering: pixelated }
pre { margin: 0; font: .8rem/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto }
details { margin: .3rem 0 }
details pre { max-height: none; background: #f6f6f4; padding: .8rem; margin-top: .3rem }
summary { cursor: pointer }
"""


def markdown(title: str, origin: str, sections: dict[str, list[Block]]) -> str:
    """Headings, tables and links to the pictures; `sections` has one list of blocks a variant."""
    parts = [f"# {title}", origin]
    for variant, blocks in sections.items():
        parts += [f"## {variant}"] if variant else []
        for block in blocks:
            if isinstance(block, Heading):
                parts.append(f"{'###' if variant else '##'} {block.text}")
            elif isinstance(block, Table):
                lines = [block.header, ["---", *["---:"] * (len(block.header) - 1)], *block.rows]
                parts += ["\n".join("| " + " | ".join(cells) + " |" for cells in lines), block.caption]
            elif isinstance(block, Picture):
                parts.append(f"![{block.caption}](figures/{block.name}.svg)")
    return "\n\n".join(parts) + "\n"


def html_page(title: str, origin: str, sections: dict[str, list[Block]]) -> str:
    parts = [f"<h1>{escape(title)}</h1><p>{escape(origin)}</p>"]
    if len(sections) > 1:
        links = (f'<a href="#{escape(variant)}">{escape(variant)}</a>' for variant in sections)
        parts.append(f"<nav>{' '.join(links)}</nav>")
    for variant, blocks in sections.items():
        heading = f"<h2>{escape(variant)}</h2>" if variant else ""
        parts += [f'<section id="{escape(variant)}">{heading}', *map(_html, blocks), "</section>"]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h3>{escape(block.text)}</h3>"
    if isinstance(block, Table):
        return f"<figure>{_table(block.header, block.rows)}<figcaption>{escape(block.caption)}</figcaption></figure>"
    if isinstance(block, Picture):
        svg = block.svg[block.svg.index("<svg") :]
        return f"<figure>{svg}<figcaption>{escape(block.caption)}</figcaption></figure>"
    if isinstance(block, Sources):
        folded = (
            f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
            for title, text in block.texts.items()
        )
        return f"<h3>{escape(block.text)}</h3>{''.join(folded)}"
    if not block.cards:
        return ""
    parts = [f"<h3>{escape(block.text)}</h3><p>{escape(block.caption)}</p>"]
    for domain in dict.fromkeys(card.domain for card in block.cards):
        cards = "".join(_card(card) for card in block.cards if card.domain == domain)
        parts.append(f'<h4>{escape(domain)}</h4><div class="cards">{cards}</div>')
    return "".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    def line(row: list[str], tag: str) -> str:
        inner = (re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(cell)) for cell in row)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in inner) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def _card(card: Card) -> str:
    images = "".join(f'<img src="{escape(uri)}" alt="{escape(card.domain)} input">' for uri in card.images)
    # a processor repeats the placeholder for every visual token
    prompt = re.sub(r"(<\|(image|video)_pad\|>\s*)+", r"[\2] ", card.prompt)
    rows = "".join(
        f"<tr><td>{escape(model)}</td><td><pre>{escape(completion)}</pre></td><td>{reward:g}</td></tr>"
        for model, (completion, reward) in card.answers.items()
    )
    head = "<thead><tr><th>model</th><th>completion</th><th>reward</th></tr></thead>"
    asked = f"{images}<pre>{escape(prompt)}</pre><p>answer: <b>{escape(card.answer)}</b></p>"
    return f'<div class="card">{asked}<table>{head}<tbody>{rows}</tbody></table></div>'
