// Draws the data of one gr.HTML (see widgets.py). Text reaches the page as text nodes only, so
// nothing needs escaping. One element per item, and only those whose item changed are touched:
// fast streams stay cheap, and what has the focus keeps it.
//
// Given by gradio: element, props, trigger, watch. Given by widgets.py: KIND, CHOOSE, EMPTY, AT_ONCE.

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
    node.classList.toggle('muted', Boolean(item.muted));
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

const TOKENS = KIND === 'tokens';

function make() {
  if (!CHOOSE) return document.createElement(TOKENS ? 'span' : 'div');
  // Tokens wrap like text, which a <button> cannot.
  const made = document.createElement(TOKENS ? 'span' : 'button');
  if (TOKENS) made.setAttribute('role', 'button');
  else made.type = 'button';
  return made;
}

const list = piece('div', 'saert-list');
const legend = piece('div', 'saert-legend');
const line = piece('div', 'saert-title'); // the title of the token pointed at, focused or chosen
let drawn = []; // the items on the page, as JSON
let titled = false; // tokens with titles are reached by Tab even where none can be chosen
let stop = 0; // the one item that Tab reaches; arrows move it

function roam(to) {
  list.children[stop]?.setAttribute('tabindex', '-1');
  stop = Math.max(0, Math.min(to, drawn.length - 1));
  list.children[stop]?.setAttribute('tabindex', '0');
}

function tell(node) {
  const one = node ?? list.querySelector(':scope > :focus') ?? list.querySelector(':scope > .on');
  line.textContent = one?.title || 'Point at a token for its numbers.';
}

function explain(items) {
  const [low, high] = props.legend ?? [];
  legend.hidden = !high || !items.some((item) => typeof item.heat === 'number');
  legend.classList.toggle('signed', Boolean(low));
  legend.replaceChildren(piece('span', '', low || '0'), piece('i', ''), piece('span', '', high));
  titled = TOKENS && items.some((item) => item.title);
  line.hidden = !titled;
}

function draw() {
  const items = Array.isArray(props.value) ? props.value : [];
  if (list.parentNode !== element) element.replaceChildren(list, legend, line);
  if (!drawn.length) list.replaceChildren();
  while (list.children.length > items.length) list.lastElementChild.remove();
  explain(items);
  const fresh = items.map((item) => JSON.stringify(item));
  items.forEach((item, index) => {
    const node = list.children[index] ?? list.appendChild(make());
    if (CHOOSE || titled) node.setAttribute('tabindex', index === stop ? '0' : '-1');
    else node.removeAttribute('tabindex');
    if (fresh[index] === drawn[index]) return;
    node.dataset.index = index;
    node.classList.toggle('on', Boolean(item.selected));
    if (CHOOSE) node.setAttribute('aria-pressed', String(Boolean(item.selected)));
    DRAW[KIND](node, item);
  });
  drawn = fresh;
  list.setAttribute('role', 'group');
  list.setAttribute('aria-label', props.label || KIND);
  if (!items.length) list.replaceChildren(piece('span', 'empty', EMPTY));
  else if ((CHOOSE || titled) && !list.contains(document.activeElement)) {
    const selected = items.findIndex((item) => item.selected);
    roam(selected < 0 ? stop : selected);
  }
  if (titled) tell();
}

let due = false;
function soon() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; draw(); });
}

function choose(node) {
  const index = +node.dataset.index;
  roam(index);
  if (!CHOOSE) return;
  if (AT_ONCE) { // at once, so that whatever is asked next is asked about this one
    props.value = props.value.map((item, at) => ({ ...item, selected: at === index }));
    soon();
  }
  trigger('select', { index });
}

if (CHOOSE || TOKENS) {
  const item = (event) => event.target.closest?.('[data-index]');
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  list.addEventListener('click', (event) => { if (item(event)) choose(item(event)); });
  list.addEventListener('keydown', (event) => {
    const node = item(event);
    if (!node || event.altKey || event.ctrlKey || event.metaKey) return;
    const at = +node.dataset.index;
    if (event.key in STEPS) roam(at + STEPS[event.key]);
    else if (event.key === 'Home') roam(0);
    else if (event.key === 'End') roam(drawn.length - 1);
    else if (CHOOSE && TOKENS && (event.key === 'Enter' || event.key === ' ')) choose(node);
    else return;
    event.preventDefault();
    list.children[stop]?.focus();
  });
  list.addEventListener('pointerover', (event) => { if (titled) tell(item(event)); });
  list.addEventListener('pointerleave', (event) => {
    if (titled && event.pointerType === 'mouse') tell();
  });
  list.addEventListener('focusin', (event) => { if (titled) tell(item(event)); });
}
watch(['value', 'label', 'legend'], soon);
draw();
