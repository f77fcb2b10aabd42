"""Runs, plans and explanations in a browser: a page on this machine alone, which draws with the charts of ``report/``.

The server holds nothing that would be lost with it. A run is a process of its own, known by what lies in its folder; a search is a
process of the server's, and ends when nobody looks at it any more.
"""
