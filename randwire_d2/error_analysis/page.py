"""The page of an analysis: one self-contained HTML file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tabulate import tabulate

# With this policy, the page loads nothing, whatever the names of classes and files contain.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ --ink: #1F2933; --quiet: #52606D; --paper: #FFFFFF; --card: #F5F7F9; --line: #CBD2D9; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #E4E7EB; --quiet: #9AA5B1; --paper: #15191E; --card: #1F2630; --line: #3E4C59; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1240px; padding: 1.5rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }}
h1, h2 {{ line-height: 1.2; overflow-wrap: anywhere; }}
h2 {{ margin: 2.5rem 0 .5rem; }}
p {{ max-width: 50rem; margin: .5rem 0 1rem; }}
.quiet {{ color: var(--quiet); overflow-wrap: anywhere; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(5rem, 1fr)); gap: .6rem;
  padding: 0; margin: 1rem 0; list-style: none; }}
.cards li {{ padding: .6rem .8rem; border-radius: .5rem; background: var(--card); }}
.cards b {{ display: block; font-size: 1.5rem; }}
.wide {{ overflow-x: auto; margin: 1rem 0; }}
.wide img {{ display: block; border-radius: .5rem; background: #FFFFFF; }}
.wide img.fit {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a picture and a table, or one of them.

    Attributes:
        about: the explanation below the heading.
        png: the content of the picture's file.
        alt: the alternative text of the picture.
        fit: whether the picture may shrink to the window; otherwise it can be scrolled.
        header, rows: the header and the rows of the table.
        words: the number of first columns that are text; the others are numbers.
    """

    heading: str
    about: str
    png: bytes | None
    alt: str
    fit: bool = True
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    words: int = 1


def render(
    title: str, source: str, lead: str, cards: Mapping[str, str], sections: Sequence[Section]
) -> str:
    """Render the page as HTML.

    Args:
        source: the origin of the numbers, shown below the title.
        lead: the first paragraph.
        cards: the main numbers, by name.
    """
    body = [f"<h1>{escape(title)}</h1>", f'<p class="quiet">{escape(source)}</p>']
    body += [f"<p>{escape(lead)}</p>", '<ul class="cards">']
    body += [f"<li><b>{escape(v)}</b>{escape(k)}</li>" for k, v in cards.items()] + ["</ul>"]
    for section in sections:
        body += [f"<h2>{escape(section.heading)}</h2>", f"<p>{escape(section.about)}</p>"]
        if section.png is not None:
            data = base64.b64encode(section.png).decode()
            fit = ' class="fit"' if section.fit else ""
            body.append(
                f'<div class="wide"><img{fit} alt="{escape(section.alt)}" '
                f'src="data:image/png;base64,{data}"></div>'
            )
        if section.rows:
            align = ["left" if i < section.words else "right" for i in range(len(section.header))]
            table = tabulate(
                section.rows, section.header, "html", disable_numparse=True, colalign=align
            )
            body.append(f'<div class="wide">{table}</div>')
    return _PAGE.format(title=escape(title), body="\n".join(body))
