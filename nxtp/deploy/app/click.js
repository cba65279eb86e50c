element.addEventListener('click', (event) => {
  const row = event.target.closest('.row');
  if (!row) return;
  element.querySelectorAll('.row').forEach((each) => {
    each.classList.toggle('chosen', each === row);
    each.setAttribute('aria-pressed', each === row);
  });
  trigger('click', {label: row.dataset.label, written: row.dataset.written});
});
