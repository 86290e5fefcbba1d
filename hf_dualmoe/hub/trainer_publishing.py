"""The Hub methods of our Trainer: one card, one commit, no pickles."""

from concurrent.futures import Future
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from .model_card import write_model_card
from .publish import publish_folder


class PublishingMixin:
    """Goes before `transformers.Trainer` among the bases; its `create_model_card` and `push_to_hub` are ours."""

    card_metadata: dict[str, Any] = {}  # of the last card; replaced, never changed

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write our card into `output_dir`, from the results.json there if there is one.

        Args:
            language, license, tags, model_name: Metadata; tags are added to ours.
            finetuned_from: Hub id of the model that this one started from.
            tasks: Ignored: the task is image classification.
            dataset_tags: Hub ids of the training data.
            dataset, dataset_args: Ignored: the card names the data of the report.
        """
        if self.is_world_process_zero():
            metadata = {"language": language, "license": license, "tags": tags, "model_name": model_name}
            self.card_metadata = {**metadata, "base_model": finetuned_from, "datasets": dataset_tags}
            write_model_card(self.args.output_dir, **self.card_metadata)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the model into `output_dir` and send it to the Hub in one commit, with its code, processor and card.

        Checkpoints and pickles (the arguments with their token among them) are never sent.

        Args:
            commit_message: First line of the commit.
            blocking: Whether to wait for the upload.
            token, revision, private: As in `transformers.Trainer.push_to_hub`.
            kwargs: As in `create_model_card`.

        Returns:
            The commit, or its future; None in all processes but the main one.

        Raises:
            ValueError: The card would not be valid, or there is no access token.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)  # on all processes: sharded models are gathered
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        options = {"token": token, "revision": revision or self.args.hub_revision, "commit_message": commit_message}
        options |= self.card_metadata

        def publish() -> CommitInfo:
            # the Trainer has put training_args.bin there: it is not sent, and no reason to refuse
            return publish_folder(self.args.output_dir, self.hub_model_id, refuse_pickles=False, **options).commit

        return publish() if blocking else HfApi().run_as_future(publish)


__all__ = ["PublishingMixin"]
