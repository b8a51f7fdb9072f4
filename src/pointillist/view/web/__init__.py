"""The viewer in the browser: server-side pages, one style sheet, one script, no build."""
