"""The report as a page: one self-contained HTML file, its JSON twin and its figures, from an exported tree alone."""

from pyro_forget.page.write import write_page

__all__ = ["write_page"]
