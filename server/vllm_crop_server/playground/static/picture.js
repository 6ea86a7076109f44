// Takes an image from a file dialog, a drop or the clipboard.

/** An image as it will be sent, and as the browser shows it: upright, as the server turns it too. */
class Picture {
  constructor(dataUrl, image) {
    this.dataUrl = dataUrl;
    this.image = image;
    this.size = [image.naturalWidth, image.naturalHeight];
  }
}

/** Calls onPicture with every image the reader gives, onProblem with words where it is none. */
export function takePictures(fileInput, stage, onPicture, onProblem) {
  const take = async (files) => {
    const file = [...files].find((each) => each.type.startsWith("image/")) ?? files[0];
    if (!file) return;
    try {
      onPicture(await load(file));
    } catch {
      onProblem(`“${file.name}” is not an image this browser can show.`);
    }
  };
  fileInput.addEventListener("change", () => take(fileInput.files));
  document.addEventListener("paste", (event) => take(event.clipboardData?.files ?? []));
  // The whole page: a file dropped beside the stage would otherwise replace the page.
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) stage.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("dropping");
    take(event.dataTransfer?.files ?? []);
  });
}

async function load(file) {
  const dataUrl = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  const image = new Image();
  image.src = dataUrl;
  await image.decode();
  if (!image.naturalWidth) throw new Error("an image without a size"); // some SVGs
  return new Picture(dataUrl, image);
}
