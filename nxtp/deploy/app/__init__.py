"""`nxtp app`: a page to try a model in a browser.

command.py reads the options and serves, page.py (with page.css and click.js) is the page, guard.py limits requests.
"""
