// Draws the data of one gr.HTML (see widgets.py). Text reaches the page as text nodes only, so
// nothing needs escaping. One element per item, and only those whose item changed are touched:
// fast streams stay cheap, and what has the focus keeps it.
//
// Given by gradio: element, props, trigger, watch. Given by widgets.py: KIND, CHOOSE, EMPTY.

const MARKS = { ' ': '·', '\n': '↵\n', '\r': '␍', '\t': '→\t' };

function piece(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text ?? '';
  return made;
}

// Text as nodes: breaks and tabs visible, and spaces too where a token is nothing else.
function running(text) {
  const hidden = text.trim() ? /([\n\r\t])/ : /([ \n\r\t])/;
  return text.split(hidden).filter((part) => part !== '').map((part) =>
    part in MARKS ? piece('span', 'mark', MARKS[part]) : document.createTextNode(part));
}

const DRAW = {
  tokens(node, item) {
    const known = typeof item.heat === 'number' && Number.isFinite(item.heat);
    node.classList.add('tk');
    node.classList.toggle('minus', known && item.heat < 0);
    node.style.setProperty('--heat', known ? Math.min(Math.abs(item.heat), 1) : 0);
    node.title = item.title ?? (known ? `heat ${item.heat.toFixed(2)}` : '');
    node.replaceChildren(...running(String(item.text ?? '')));
  },
  bars(node, item) {
    node.classList.add('bar');
    node.classList.toggle('minus', item.share < 0);
    node.style.setProperty('--share', Math.min(Math.abs(item.share ?? 0), 1));
    node.replaceChildren(
      piece('b', '', item.name), document.createTextNode(' '), piece('i', '', item.label),
      document.createTextNode(' '), piece('span', 'value', item.value));
  },
  figures(node, item) {
    node.classList.add('figure');
    node.replaceChildren(
      piece('span', 'name', item.name), document.createTextNode(' '), piece('b', '', item.value),
      document.createTextNode(' '), piece('small', '', item.note));
  },
};

function make() {
  if (!CHOOSE) return document.createElement(KIND === 'tokens' ? 'span' : 'div');
  // Tokens wrap like text, which a <button> cannot.
  const made = document.createElement(KIND === 'tokens' ? 'span' : 'button');
  if (KIND === 'tokens') made.setAttribute('role', 'button');
  else made.type = 'button';
  return made;
}

let drawn = []; // the items on the page, as JSON
let stop = 0; // the one item that Tab reaches; arrows move it

function roam(to) {
  element.children[stop]?.setAttribute('tabindex', '-1');
  stop = Math.max(0, Math.min(to, drawn.length - 1));
  element.children[stop]?.setAttribute('tabindex', '0');
}

function draw() {
  const items = Array.isArray(props.value) ? props.value : [];
  if (!drawn.length) element.replaceChildren();
  while (element.children.length > items.length) element.lastElementChild.remove();
  const fresh = items.map((item) => JSON.stringify(item));
  items.forEach((item, index) => {
    if (fresh[index] === drawn[index]) return;
    const node = element.children[index] ?? element.appendChild(make());
    node.dataset.index = index;
    node.classList.toggle('on', Boolean(item.selected));
    if (CHOOSE) {
      node.setAttribute('aria-pressed', String(Boolean(item.selected)));
      node.setAttribute('tabindex', index === stop ? '0' : '-1');
    }
    DRAW[KIND](node, item);
  });
  drawn = fresh;
  element.setAttribute('role', 'group');
  element.setAttribute('aria-label', props.label || KIND);
  if (!items.length) element.replaceChildren(piece('span', 'empty', EMPTY));
  else if (CHOOSE && !element.contains(document.activeElement)) {
    const selected = items.findIndex((item) => item.selected);
    roam(selected < 0 ? stop : selected);
  }
}

let due = false;
function soon() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; draw(); });
}

if (CHOOSE) {
  const choose = (node) => {
    roam(+node.dataset.index);
    trigger('select', { index: +node.dataset.index });
  };
  element.addEventListener('click', (event) => {
    const node = event.target.closest('[data-index]');
    if (node) choose(node);
  });
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  element.addEventListener('keydown', (event) => {
    const node = event.target.closest('[data-index]');
    if (!node || event.altKey || event.ctrlKey || event.metaKey) return;
    const at = +node.dataset.index;
    if (event.key in STEPS) roam(at + STEPS[event.key]);
    else if (event.key === 'Home') roam(0);
    else if (event.key === 'End') roam(drawn.length - 1);
    else if ((event.key === 'Enter' || event.key === ' ') && KIND === 'tokens') choose(node);
    else return;
    event.preventDefault();
    element.children[stop]?.focus();
  });
}
watch(['value', 'label'], soon);
draw();
