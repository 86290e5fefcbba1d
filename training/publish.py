"""Publish a trained model on the Hub: weights, code, image processor, results, plots and card, in one commit.

python training/publish.py --model outputs/digits-jtdmoe/model --repo_id user/name --dry_run  # look first
python training/publish.py --model outputs/digits-jtdmoe/model --repo_id user/name --private
"""

from argparse import ArgumentParser, Namespace
from typing import NoReturn

from hf_dualmoe.cli.script_arguments import ScriptParser
from hf_dualmoe.evaluation.environment import print_in_any_encoding
from hf_dualmoe.hub.publish import publish_folder
from hf_dualmoe.hub.upload_plan import Upload, hide_tokens, plan_upload


class Parser(ScriptParser):
    """A parser whose errors never repeat a token that was mistyped into the command line."""

    def error(self, message: str) -> NoReturn:
        super().error(hide_tokens(message))


def create_parser() -> ArgumentParser:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="Folder of a saved model, best with its results.json.")
    add("--repo_id", required=True, metavar="USER/NAME", help="Where to publish; created where it does not exist.")
    add("--private", action="store_true", help="Create it private; a public one is then refused.")
    add("--revision", metavar="BRANCH", help="Branch to commit to, created where it does not exist; default: main.")
    add("--commit_message", default="Upload model", help="First line of the commit.")
    add("--dry_run", action="store_true", help="List what would be sent and show the card; send nothing.")
    add("--token", help="Access token; better: log in with `hf auth login`, or set HF_TOKEN.")
    return parser


def main() -> None:
    print_in_any_encoding()
    parser = create_parser()
    args = parser.parse_args()
    try:
        upload = plan_upload(args.model, args.repo_id)
        print(describe(upload))
        if args.dry_run:
            print(f"\nThe card:\n\n{upload.card}\nDry run: nothing was sent.")
            return
        publish(args)
    except Exception as error:  # any: a traceback may hold the token
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        parser.exit(2, f"{parser.prog}: error: {hide_tokens(name + str(error), args.token)}\n")


def publish(args: Namespace) -> None:
    """Send the folder and say what became of it."""
    token = args.token.strip() if args.token else None  # a pasted one ends in a line break
    options = {"revision": args.revision, "commit_message": args.commit_message, "token": token}
    # None, not False: an account may make repositories private by default
    published = publish_folder(args.model, args.repo_id, private=args.private or None, **options)
    for note in published.notes:
        print(f"Note: {note}")
    commit = published.commit.oid
    if not published.changed:
        print(f"\nNothing changed: {args.repo_id} holds all this already, at commit {commit}.")
        return
    print(f"\nPublished: {published.commit.commit_url}")
    print(f'Load it with from_pretrained("{args.repo_id}", revision="{commit}", trust_remote_code=True)')


def describe(upload: Upload) -> str:
    """The files with their sizes, what is left out, and warnings."""
    sizes = upload.sizes()
    lines = [f"{size:>14,}  {name}" for name, size in sizes.items()]
    lines += [f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, to {upload.repo_id}"]
    lines += [f"Left out: {', '.join(upload.left_out)}"] if upload.left_out else []
    return "\n".join([*lines, *(f"Warning: {warning}" for warning in upload.warnings)])


if __name__ == "__main__":
    main()
