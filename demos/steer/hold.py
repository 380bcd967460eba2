"""Run waits for what was clicked before it, so that what runs is what the page shows.

An event with `js=hold(name)` that is followed by `landed(event, name)` is waited for. Run,
clicked meanwhile, runs once the last of them has landed.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.context import Context

# By name, not by number: what follows an event that runs again at once (`always_last`) runs once.
_HOLD = """(...given) => {
  const held = (window.saertHeld ??= {names: new Set(), asked: false});
  held.names.add('NAME');
  document.getElementById('steer-run')?.setAttribute('aria-busy', 'true');
  return given;
}"""

# A little later: rows that follow from what has landed are held by then.
_RELEASE = """() => setTimeout(() => {
  const held = window.saertHeld, run = document.getElementById('steer-run');
  held.names.delete('NAME');
  if (held.names.size) return;
  run?.setAttribute('aria-busy', 'false');
  if (held.reveal) {
    const rows = document.querySelectorAll('.steer-row');
    rows[rows.length - 1]?.scrollIntoView({block: 'center'});
  }
  held.reveal = false;
  held.go?.();
}, 50)"""

# Once, when the page is there. Another tab's “Steer with this” leads to the row it added; results
# below the window are scrolled to.
INSTALL = """() => {
  if (window.saertHeld?.installed) return;
  const held = (window.saertHeld ??= {names: new Set(), asked: false});
  held.installed = true;
  let ours = false; // the click that follows is what a person's click came to
  held.go = () => {
    if (!held.asked || held.names.size) return;
    held.asked = false;
    ours = true;
    document.getElementById('steer-run')?.click();
    ours = false;
  };
  document.addEventListener('click', event => {
    const id = event.target.closest?.('button')?.id ?? '';
    if (id === 'explore-steer' || id === 'ablate-steer') held.reveal = true;
    if (id !== 'steer-run') return;
    if (!ours) { // gradio gets to what was clicked before a little later
      event.stopImmediatePropagation();
      held.asked = true;
      setTimeout(held.go, 50);
      return;
    }
    const results = document.querySelector('.steer-results');
    if (results && results.getBoundingClientRect().top > innerHeight - 160)
      results.scrollIntoView({block: 'start', behavior: 'smooth'});
  }, true);
  document.addEventListener('keydown', event => {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey || event.shiftKey)) return;
    if (!event.target.closest?.('#steer-prompt')) return;
    event.preventDefault();
    event.stopPropagation();
    document.getElementById('steer-run')?.click();
  }, true);
}"""


def hold(name: str) -> str:
    """The `js` of an event that Run waits for."""
    return _HOLD.replace("NAME", name)


def landed(event: Any, name: str) -> None:
    """Run need not wait for an event any more once it has ended, well or badly."""
    for after in (event.then, event.failure):
        after(None, js=_RELEASE.replace("NAME", name))


def install() -> None:
    """Have the page hold Run. Called once, while the app is laid out."""
    assert Context.root_block is not None  # a tab is laid out within the app
    gr.on([Context.root_block.load], None, js=INSTALL, api_visibility="private")
