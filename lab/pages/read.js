// Where everything is, in pixels: what `data-at` names, and every letter that is drawn.
() => {
  const inView = (place) =>
    place.width > 0 && place.left >= 0 && place.top >= 0 && place.right <= innerWidth && place.bottom <= innerHeight;
  const boxes = {};
  const range = document.createRange();
  for (const each of document.querySelectorAll("[data-at]")) {
    range.selectNodeContents(each);
    const place = range.getBoundingClientRect();
    if (inView(place)) boxes[each.dataset.at] = [place.left, place.top, place.right, place.bottom];
  }
  const letters = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (["SCRIPT", "STYLE"].includes(node.parentElement.tagName)) continue;
    let begins = true;
    const upper = getComputedStyle(node.parentElement).textTransform === "uppercase";
    for (let index = 0; index < node.length; index++) {
      const letter = node.data[index];
      if (!letter.trim()) {
        begins = true;
        continue;
      }
      range.setStart(node, index);
      range.setEnd(node, index + 1);
      const place = range.getBoundingClientRect();
      if (!inView(place)) continue;
      const middle = [(place.left + place.right) / 2, (place.top + place.bottom) / 2];
      letters.push([upper ? letter.toUpperCase() : letter, ...middle, begins]);
      begins = false;
    }
  }
  return { boxes, letters };
}
