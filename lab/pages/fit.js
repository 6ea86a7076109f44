// Removes rows, the last of the longest table first, until all that is asked about is in view.
// Returns how many rows of each table are left.
() => {
  const rows = (table) => [...document.querySelectorAll(`[data-row="${table}"]`)];
  const tables = [...new Set([...document.querySelectorAll("[data-row]")].map((row) => row.dataset.row))];
  const counted = (row) => Number(row.dataset.count ?? 1);
  const outside = (each) => {
    const place = each.getBoundingClientRect();
    return place.bottom > innerHeight - 1;
  };
  while ([...document.querySelectorAll("[data-at]")].some(outside)) {
    const longest = tables.reduce((most, each) => (rows(each).length > rows(most).length ? each : most), "");
    if (rows(longest).length < 2) break;
    rows(longest).at(-1).remove();
  }
  return Object.fromEntries(tables.map((each) => [each, rows(each).reduce((sum, row) => sum + counted(row), 0)]));
}
