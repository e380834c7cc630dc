"""One page about a run, for people: `document.write` puts it together."""
