// The theme: what the system prefers, until the button says otherwise. Loaded before the page is
// drawn, so that it doesn't flash in the wrong one.
{
  const root = document.documentElement;
  const stored = () => { try { return localStorage.getItem('theme'); } catch { return null; } };
  const dark = () => (root.dataset.theme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  if (['light', 'dark'].includes(stored())) root.dataset.theme = stored();
  addEventListener('DOMContentLoaded', () => {
    const button = document.getElementById('theme');
    const say = () => button.setAttribute('aria-label', dark() ? 'Light theme' : 'Dark theme');
    say();
    button.addEventListener('click', () => {
      root.dataset.theme = dark() ? 'light' : 'dark';
      try { localStorage.setItem('theme', root.dataset.theme); } catch { /* kept for this page alone */ }
      say();
    });
  });
}
