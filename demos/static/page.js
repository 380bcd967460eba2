// Runs once when the page is there: light and dark, and what gradio leaves out for people who do
// not see the page or have no mouse.
() => {
  const KEY = 'saert-theme';
  const asked = new URL(location.href).searchParams.get('__theme');
  const preferred = matchMedia('(prefers-color-scheme: dark)');

  function remembered() {
    try { return localStorage.getItem(KEY); } catch { return null; }
  }
  function remember(name) {
    try { localStorage.setItem(KEY, name); } catch { /* private windows may refuse */ }
  }
  function wear(name) {
    document.body.classList.toggle('dark', name === 'dark');
    document.body.style.background = 'var(--body-background-fill)'; // below a short page
    document.documentElement.style.colorScheme = name;
    const button = document.getElementById('theme-switch');
    if (!button) return;
    button.textContent = name === 'dark' ? '☀' : '☾';
    const says = name === 'dark' ? 'Switch to light colours' : 'Switch to dark colours';
    button.setAttribute('aria-label', says);
    button.title = says;
  }
  const worn = () => (document.body.classList.contains('dark') ? 'dark' : 'light');

  wear(asked === 'dark' || asked === 'light' ? asked : remembered() ?? worn());
  preferred.addEventListener('change', () => { // after gradio's own listener
    wear(remembered() ?? (preferred.matches ? 'dark' : 'light'));
  });
  document.addEventListener('click', (event) => {
    if (!event.target.closest?.('#theme-switch')) return;
    const name = worn() === 'dark' ? 'light' : 'dark';
    remember(name);
    wear(name);
  });

  // A message of gradio's is a button with the button that closes it inside: one is enough.
  new MutationObserver((changes) => {
    if (!changes.some((change) => change.addedNodes.length)) return;
    for (const header of document.querySelectorAll('.toast-header[role="button"]')) {
      header.removeAttribute('role');
      header.removeAttribute('tabindex');
    }
  }).observe(document.body, { childList: true, subtree: true });
}
